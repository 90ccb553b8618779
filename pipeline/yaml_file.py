"""YAML that people write, read as they mean it: keys are text, 1e-7 is a number, no key occurs twice."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from kanyun.errors import UserError
from kanyun.storage import Folder


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Take keys as they are written: YAML 1.1 would make False of `no` and 8 of `010`."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} occurs twice", key.start_mark)
            seen.add(key.value)
        self.flatten_mapping(node)  # merges what `<<` names, before the mapping's own keys
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


# Values as YAML 1.2 has them: 1.1 would make 8 of `010`, 90 of `1:30`, False of `no`, and nothing of `1e-7`.
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     list("-+0123456789.")),
    ("merge", "<<", ["<"]),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def load_yaml(path: str, what: str) -> Any:
    """Return the values of a YAML file. Raises UserError if it is not there or not YAML; `what` names its purpose."""
    file = Folder(path)
    if not file.exists():
        raise UserError(f"there is no {what} {path}")
    try:
        return yaml.load(file.read(""), _Loader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
