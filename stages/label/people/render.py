"""Text from models as HTML for the page: Markdown without anything that loads, runs or leads elsewhere."""

from functools import cache

from markdown_it import MarkdownIt

from data.rows import Text

# Raw HTML stays text. So do links and images: a page that shows what models wrote offers nothing to click or to fetch.
_OFF = ("html_block", "html_inline", "link", "image", "autolink", "reference")


def as_turns(text: Text) -> list[dict[str, str]]:
    """The text's turns as {"role", "html"}; plain text is one turn without a role."""
    if isinstance(text, str):
        return [{"role": "", "html": as_html(text)}]
    return [{"role": turn["role"], "html": as_html(turn["content"])} for turn in text]


def as_html(text: str) -> str:
    """The text's Markdown as HTML; every tag in it is one that Markdown makes."""
    markdown = _markdown()
    tokens = markdown.parse(text)
    for token in tokens:
        token.attrs.pop("style", None)  # of table cells; the page's policy allows no inline style
    return markdown.renderer.render(tokens, markdown.options, {})


@cache
def _markdown() -> MarkdownIt:
    # Line breaks count, as they do for who reads a model's answer.
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": True})
    return markdown.enable(["table", "strikethrough"]).disable(_OFF)
