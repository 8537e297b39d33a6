"""YAML as the configs use it: 1e-4 is a number, a key stands once, and what is dumped reads back the same."""

import re
from typing import Any

import yaml

_FLOAT_TAG = "tag:yaml.org,2002:float"
# PyYAML follows YAML 1.1, where a float needs a dot and a signed exponent, so that 1e-4 would be a string.
_FLOAT = re.compile(
    r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)


class DuplicateKey(yaml.YAMLError):
    """A mapping names one key twice."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node; refuses a repeated key, of which YAML would silently keep the last."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise DuplicateKey(f"line {key_node.start_mark.line + 1}: key {key_node.value!r} stands twice")
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:  # a config is a tree; anchors would only puzzle the reader
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes these line ends bare in plain text, and reads them back as a space.
    style = '"' if any(character in text for character in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))


def parse_yaml(text: str) -> Any:
    """The value of one YAML document. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def dump_yaml(value: object, *, one_line: bool = False) -> str:
    """`value` as YAML text that `parse_yaml` turns back into an equal value."""
    width = 2**31 if one_line else 120
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width, default_flow_style=one_line
    )


def yaml_problem(error: yaml.YAMLError) -> str:
    """One line that says where and why a text is no YAML."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    return " ".join(str(error).split())
