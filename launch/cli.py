"""The `launch` command: arguments in, exit status out. Imports nothing heavy, so that --help is instant.

Exit status: 0 done; 2 the user can mend it; 75 stopped by SIGTERM or SIGINT with a checkpoint written, to be resumed;
1 anything else, with a traceback. A second signal stops at once, with 1 and without a new checkpoint.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from launch.answer import Answer

_COMMANDS = {
    "sft": "Fine-tune the base model on demonstrations.",
    "label": "Turn a policy's answers into preferences, by a judge or by people.",
    "rm": "Train a reward model on preference pairs.",
    "dpo": "Train a policy straight on preference pairs, in place of rm and ppo.",
    "ppo": "Optimise the policy against a reward.",
    "eval": "Compare policies on prompts none was trained on.",
    "run": "Run the whole chain; finished stages are skipped.",
}
_EPILOG = (
    "Exit status: 0 done; 2 you can mend it; 75 stopped by a signal, resume with the same command; 1 anything else."
)

app = typer.Typer(
    help="Classic RLHF, one command a stage: sft -> label -> rm -> ppo, or sft -> dpo. "
    "CONFIG is a YAML file or a bundled recipe (quickstart).",
    epilog=_EPILOG,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a bundled recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted keys, parsed as YAML: ppo.kl.coef=0.02")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder. Default: runs/<name>.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Plan only; write nothing.")]
Resume = Annotated[
    Literal["auto", "never", "must"],
    typer.Option("--resume", metavar="auto|never|must", help="What to do about an unfinished stage."),
]
Gpus = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        metavar="N",
        help="0: the CPU; 1: one GPU; more: that many processes (on each host), a GPU each where there are GPUs.",
    ),
]
Hostfile = Annotated[
    Path | None, typer.Option("--hostfile", metavar="FILE", help="Hosts to train on, `name slots=4` a line, by ssh.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; everything else on stderr.")]


def _add_command(name: str) -> None:
    def command(
        config: Config,
        overrides: Overrides = None,
        out: Out = None,
        dry_run: DryRun = False,
        resume: Resume = "auto",
        gpus: Gpus = None,
        hostfile: Hostfile = None,
        as_json: Json = False,
    ) -> None:
        from launch.worker import Request, carry_out

        where = (tuple(overrides or ()), out, dry_run, resume, gpus, hostfile)
        raise typer.Exit(_guarded(lambda: carry_out(Request(name, config, *where)), as_json=as_json))

    app.command(name, help=_COMMANDS[name])(command)


def _add_label() -> None:
    def label(
        config: Config,
        overrides: Overrides = None,
        people: Annotated[bool, typer.Option("--people", help="Serve a local page on which people compare.")] = False,
        port: Annotated[int | None, typer.Option("--port", metavar="N", help="Of the page. Default: 8765.")] = None,
        out: Out = None,
        dry_run: DryRun = False,
        resume: Resume = "auto",
        gpus: Gpus = None,
        hostfile: Hostfile = None,
        as_json: Json = False,
    ) -> None:
        from launch.worker import Request, carry_out

        page = () if port is None else (f"label.people.port={port}",)
        request = Request(
            command="label",
            config=config,
            overrides=(*(overrides or ()), *page),
            out=out,
            plan_only=dry_run,
            resume=resume,
            gpus=gpus,
            hostfile=hostfile,
            people=people,
        )
        raise typer.Exit(_guarded(lambda: carry_out(request), as_json=as_json))

    app.command("label", help=_COMMANDS["label"])(label)


for _name in _COMMANDS:
    if _name == "label":
        _add_label()
    else:
        _add_command(_name)


@app.command(
    help="Everything short of training: data checks, masks shown, batch arithmetic, memory, time; writes nothing."
)
def plan(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = "auto",
    gpus: Gpus = None,
    hostfile: Hostfile = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="NAME", help="Estimate time and fit for it: h100-80gb, a100-80gb, …"),
    ] = None,
    show: Annotated[
        Literal["deepspeed"] | None,
        typer.Option("--show", metavar="deepspeed", help="Print DeepSpeed's JSON as the run would have it, no more."),
    ] = None,
    as_json: Json = False,
) -> None:
    from launch.worker import Request, carry_out

    where = (tuple(overrides or ()), out, True, resume, gpus, hostfile)
    request = Request("plan", config, *where, device=device, show=show)
    raise typer.Exit(_guarded(lambda: carry_out(request), as_json=as_json))


@app.command(help="What is installed, what is missing, and what would run here.")
def doctor(as_json: Json = False) -> None:
    from launch.doctor import examine

    raise typer.Exit(_guarded(examine, as_json=as_json))


@app.command(help="Write a commented starter config.")
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path("config.yaml"),
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema, for editors; write nothing.")
    ] = False,
) -> None:
    from launch.starter import print_schema, write_starter

    raise typer.Exit(_guarded(print_schema if schema else lambda: write_starter(file), as_json=False))


StageDir = Annotated[str, typer.Argument(metavar="STAGE_DIR", help="A finished stage, a model folder or a hub id.")]


@app.command(help="Talk to a policy in the terminal; Ctrl-D ends it.")
def chat(
    policy: StageDir,
    engine: Annotated[Literal["auto", "native", "vllm"], typer.Option("--engine", help="Who samples.")] = "auto",
    temperature: Annotated[float, typer.Option("--temperature", min=0.01, help="Of sampling.")] = 1.0,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Most tokens of an answer. Default: half of max_length, 256 at most."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed and words, the same answers.")] = 0,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Each line is a prompt by itself, without a chat template."),
    ] = False,
) -> None:
    from launch.worker import set_environment

    set_environment(None)
    from launch import chat as chatting

    options = chatting.ChatOptions(policy, engine, temperature, max_tokens, seed, plain)
    raise typer.Exit(_guarded(lambda: chatting.chat(options), as_json=False))


@app.command(help="Serve a policy by vLLM, with OpenAI's interface; to this machine alone, unless --host is given.")
def serve(
    policy: StageDir,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8000,
    token_env: Annotated[
        str | None,
        typer.Option("--token-env", metavar="NAME", help="Environment variable with the token; default: a new one."),
    ] = None,
) -> None:
    from launch import serve as serving

    options = serving.ServeOptions(policy, host, port, token_env)
    raise typer.Exit(_guarded(lambda: serving.serve(options), as_json=False))


def _guarded(action: Callable[[], "Answer"], *, as_json: bool) -> int:
    """The exit status of a command; prints its answer, or one line per mistake that the user can mend.

    A rank's process ends here.
    """
    from launch.answer import answering, end_rank, is_rank

    status = answering(action, as_json=as_json)
    if is_rank():
        end_rank(status)
    return status


def forget_working_directory() -> None:
    """Takes the working directory off the import path, so that its `data` or `configs` folder never hides ours."""
    project = Path(__file__).resolve().parent.parent
    here = Path.cwd().resolve()
    if here != project:
        sys.path[:] = [entry for entry in sys.path if entry != "" and Path(entry).resolve() != here]


def main() -> None:
    """Entry point of the `launch` command."""
    forget_working_directory()
    app()


if __name__ == "__main__":
    main()
