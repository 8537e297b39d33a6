"""What is settled before a judge is asked: answers that are none, strings that fool judges, text that speaks to one.

"Master keys" are from Zhao et al. 2025 (arXiv 2507.08794): openers and marks that made judges reward empty answers.
"""

import re
import unicodedata

MASTER_KEYS = frozenset(
    {
        "thought process",
        "thinking process",
        "let's solve this problem step by step",
        "let us solve this problem step by step",
        "let's think step by step",
        "solution",
        "answer",
        "final answer",
        "解",
        "解答",
        "かいせつ",
        "respuesta",
    }
)
_EDGES = " \t\r\n.,:;!?*#`\"'-–—…：。、"
_JUDGE = r"(?:judge|evaluator|grader|rater|reviewer|annotator|assessor|evaluation (?:model|system|prompt))"
_VERDICT = r"(?:verdict|preference|winner|grade|score|rating|judge?ment)"
_RESPONSE = r"(?:response|answer|assistant|output|option|candidate)"
_WHICH = r"(?:this|my|that|the (?:above|present|following|other|first|second))"
_THIS = rf"(?:{_WHICH} {_RESPONSE}|{_RESPONSE} (?:\"?[ab12]\"?)\b)"
_REVOKED = r"(?:instruction|prompt|rubric|criteri|rule|guideline|above|previous|earlier|comparison)"
_CHOOSE = r"(?:choose|pick|select|prefer|rank|rate|vote(?: for)?|favou?r|declare|output|answer with)"
_BEST = r"(?:better|best|wins?|winner|superior|preferred|correct choice|highest|top|perfect|full marks|10)"
_PATTERNS = (
    ("revokes instructions", rf"\b(?:ignore|disregard|forget|override|overrule)\b.{{0,40}}\b{_REVOKED}"),
    ("gives the verdict's JSON", r"[\"']verdict[\"']\s*:|\bverdict\b\s*[:=]\s*[\"']?(?:[ab]\b|tie\b|\d)"),
    ("gives a verdict mark", r"\[\[\s*(?:[ab]|tie|\d+)\s*\]\]"),
    (
        "ends the data",
        r"(?:^|\n)\s*(?:</?(?:data|response|system|user|instructions?)\b[^>\n]*>|(?:BEGIN|END) [0-9a-f]{8})",
    ),
    ("begins a turn", r"<\|(?:im_start|im_end|system|user|assistant|eot_id|start_header_id)[^>]*\|?>|\[/?INST\]"),
    ("begins a turn", r"(?:^|\n)\s*#*\s*(?:system|developer)\s*(?:message|prompt|note|override)?\s*:"),
    (
        "speaks to the judge",
        rf"\b(?:dear|note to|attention|message (?:to|for)|instructions? (?:to|for)|as) (?:the |an? |all )?{_JUDGE}",
    ),
    (
        "speaks to the judge",
        rf"\b(?:you|{_JUDGE}s?) (?:must|should|shall|will|need to|have to|are to|ought to) (?:\w+ )?{_CHOOSE}\b",
    ),
    ("asks to be chosen", rf"\b{_CHOOSE}\b.{{0,30}}{_THIS}"),
    (
        "claims a verdict",
        rf"{_THIS}.{{0,40}}\b(?:wins\b|(?:is|has been|was|deserves|gets|receives)\b.{{0,40}}\b{_BEST}\b)",
    ),
    (
        "claims a verdict",
        rf"\b(?:the )?(?:correct|right|final|official|only valid|expected) {_VERDICT} (?:is|must be|:)",
    ),
)
_SUSPICIOUS = [(what, re.compile(pattern, re.I | re.S)) for what, pattern in _PATTERNS]


def trivial(response: str, *, min_words: int = 1) -> str | None:
    """Why a response is no answer at all, or None: too few words, or nothing but a master key."""
    words = re.findall(r"\w+", response)
    if not words:
        return "empty" if not response.strip() else "no words"
    if re.sub(r"\s+", " ", unicodedata.normalize("NFKC", response)).strip(_EDGES).lower() in MASTER_KEYS:
        return "master key"
    return f"fewer than {min_words} words" if len(words) < min_words else None


def suspicious(response: str) -> str | None:
    """What in a response speaks to a judge instead of answering, or None.

    Patterns find the usual wordings, and only those; an honest answer about judging can match too, so such a pair is
    set aside and never decided by this.
    """
    text = unicodedata.normalize("NFKC", response)
    text = "".join(each for each in text if unicodedata.category(each) != "Cf")
    return next((what for what, pattern in _SUSPICIOUS if pattern.search(text)), None)
