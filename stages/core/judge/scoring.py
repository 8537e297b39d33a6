"""A judge as a source of scores: PPO's online reward (direct RLAIF, Lee et al. 2023), and an evaluator."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.artifacts import sha256_json
from data.errors import UserError
from stages.core import ranks
from stages.core.context import Interrupted, StageContext
from stages.core.judge.asking import Asker, Unanswered, for_each
from stages.core.judge.defences import suspicious, trivial
from stages.core.judge.ledger import LEDGER, Ledger, Verdict
from stages.core.judge.limits import Limits
from stages.core.judge.opening import identity, open_judge
from stages.core.judge.prompts import LEAST, MOST
from stages.core.judge.question import Question, ask, draw_principles
from stages.core.judge.reward import RewardJudge
from stages.core.rewards import Answered


def judge_scorer(judge: RewardJudge, context: StageContext[Any]) -> "JudgeScorer":
    """The judge as a source of scores in a stage, with its ledger in the stage's folder."""
    return JudgeScorer(judge, context.out / LEDGER, context.run_folder, context.shared.seed, context.should_stop)


@dataclass
class JudgeScorer:
    """Grades responses by a judge; every grade is in the ledger, so a resumed run pays for none twice."""

    judge: RewardJudge
    ledger: Path
    run_folder: Path
    seed: int
    should_stop: Callable[[], bool]
    _limits: Limits | None = field(default=None, init=False)  # what was asked in the last minute, over all batches

    def score(self, answered: Answered) -> list[float]:
        """(points - 5.5) / 4.5 of each response; NaN where the judge gave no usable answer, or was not asked.

        What is no answer at all gets the least points unasked. What speaks to the judge is not put to it, and has no
        score: nothing is to be won by it, and an honest answer that only looks so is not punished. Raises Interrupted,
        and UserError where more than `max_unanswered` of the responses have no score. One rank asks for all.
        """
        return ranks.alone(lambda: self._score(answered), Interrupted)

    def _score(self, answered: Answered) -> list[float]:
        points = [float(LEAST) if trivial(text) else math.nan for text in answered.responses]
        addressing = {place: what for place, text in enumerate(answered.responses) if (what := suspicious(text))}
        waiting = [place for place, each in enumerate(points) if math.isnan(each) and place not in addressing]
        questions = [self._question(answered, place) for place in waiting]
        grades = asyncio.run(self._grade({question.key: question for question in questions})) if questions else {}
        causes = [f"a response speaks to the judge ({what})" for what in addressing.values()]
        for place, question in zip(waiting, questions, strict=True):
            grade = grades[question.key]
            if isinstance(grade, Unanswered):
                causes.append(grade.cause)
            else:
                points[place] = float(grade.value)
        if causes and (len(causes) > self.judge.max_unanswered * len(points) or len(causes) == len(points)):
            raise UserError(
                f"judge {self.judge.name}: no usable score for {len(causes)} of {len(points)} responses, more than "
                f"max_unanswered={self.judge.max_unanswered:g} (first: {causes[0]}); mend it and run again"
            )
        middle, half = (LEAST + MOST) / 2, (MOST - LEAST) / 2
        return [(each - middle) / half for each in points]

    def _question(self, answered: Answered, place: int) -> Question:
        prompt, response = answered.prompts[place], answered.responses[place]
        principles = draw_principles(self.judge, seed=self.seed, item=sha256_json([prompt, response]))
        return ask(self.judge, identity(self.judge, run_folder=self.run_folder), prompt, [response], principles)

    async def _grade(self, questions: dict[str, Question]) -> dict[str, Verdict | Unanswered]:
        """The grade of each question, by its key: responses that are the same are graded once."""
        grades: dict[str, Verdict | Unanswered] = {}
        with Ledger(self.ledger) as ledger:
            async with open_judge(self.judge, ledger, run_folder=self.run_folder) as asker:
                self._keep_limits(asker)

                async def work(question: Question) -> None:
                    grades[question.key] = await asker.answer(question)

                concurrency = self.judge.max_concurrency
                await for_each(questions.values(), work, at_a_time=concurrency, should_stop=self.should_stop)
        return grades

    def _keep_limits(self, asker: Asker) -> None:
        """The limits go on counting where the last batch left them; their locks belong to one event loop.

        What is spent is what the ledger says, whoever spent it.
        """
        if self._limits is not None:
            asker.limits = replace(self._limits, spent=asker.limits.spent)
        self._limits = asker.limits
