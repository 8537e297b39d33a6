"""`launch init`: a commented starter config, generated from the schema so that it cannot fall behind it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from data.artifacts import write_atomically
from data.errors import UserError
from launch.answer import Answer
from pipeline.config import RunConfig
from pipeline.yaml_text import dump_yaml

_HEADER = """\
# One file = one whole run. Start it with:   launch run {name}
# Check it first, without training:          launch plan {name}
# Lines behind '#' show defaults; take the '#' away to change one. Paths are looked up beside this file.
"""
# What has no default, or is changed by most people.
_EXAMPLE: Mapping[str, Any] = {
    "name": "my-run",
    "base_model": "path/or/hub-id",
    "seed": 0,
    "max_length": 512,
    "sft": {"data": [{"path": "demonstrations.jsonl"}]},
    "rm": {"data": [{"path": "preferences.jsonl"}]},
    "ppo": {"prompts": [{"path": "prompts.jsonl"}], "updates": 100},
    "eval": {"prompts": [{"path": "eval_prompts.jsonl"}]},
}
_LEFT_OUT = ("toy",)
# In place of rows or sections above: there, but commented out as a whole.
_ALTERNATIVE: Mapping[str, Any] = {
    "label": {
        "prompts": [{"path": "prompts.jsonl"}],
        "judge": {"base_url": "http://127.0.0.1:8000/v1", "model": "name", "api_key_env": "JUDGE_KEY"},
    },
    "dpo": {"data": [{"path": "preferences.jsonl"}]},
}


def write_starter(path: Path) -> Answer:
    """Writes the starter config to `path`. Raises UserError where something stands there already."""
    if path.exists():
        raise UserError(f"{path}: exists already and is left as it is; give another name")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")
    write_atomically(path, starter_text(path.name))
    data = {"status": "done", "path": str(path.absolute())}
    return Answer(data, lambda: print(f"{path} written; fill in base_model and data, then: launch plan {path}"))


def print_schema() -> Answer:
    """The JSON schema of a config, for editors that complete and check YAML by one."""
    schema = RunConfig.model_json_schema()
    return Answer(schema, lambda: print(json.dumps(schema, indent=2)))


def starter_text(name: str) -> str:
    """The starter config: every key with its description, those without a default filled in as examples."""
    return _HEADER.format(name=name) + "".join(f"{line}\n" for line in _lines(RunConfig, _EXAMPLE))


def _lines(model: type[BaseModel], example: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, field in model.model_fields.items():
        if name in _LEFT_OUT:
            continue
        value = example.get(name, _ALTERNATIVE.get(name))
        section = _section(field)
        if isinstance(value, dict) and section is not None:
            comment = _first_line(section)
            off = "# " if name in _ALTERNATIVE else ""
            lines += ["", f"# {comment}", f"{off}{name}:"]
            lines += [f"{off}  {line}".rstrip() for line in _lines(section, cast(dict[str, Any], value))]
        elif name in example:
            lines.append(_commented(f"{name}: {_flow(value)}", field.description))
        else:
            lines.append(_commented(f"# {name}: {_flow(_default(field))}", field.description))
    return lines


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model of an optional section."""
    for part in getattr(field.annotation, "__args__", (field.annotation,)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _default(field: FieldInfo) -> object:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_none=True)
    if isinstance(value, (list, dict)):
        return json.loads(json.dumps(value, default=lambda model: model.model_dump(exclude_none=True)))
    return None if value is PydanticUndefined else value


def _flow(value: object) -> str:
    """A value as YAML on one line."""
    return dump_yaml(value, one_line=True).removesuffix("...\n").strip()


def _commented(line: str, comment: str | None) -> str:
    return f"{line:<40}  # {comment}" if comment else line


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or model.__name__).strip().splitlines()[0].rstrip(".")
