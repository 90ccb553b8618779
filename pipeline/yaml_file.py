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


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)
# YAML 1.1 wants a dot in a number with an exponent.
_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def load_yaml(path: str, what: str) -> Any:
    """Return the values of a YAML file. Raises UserError if it is not there or not YAML; `what` names its purpose."""
    file = Folder(path)
    if not file.exists():
        raise UserError(f"there is no {what} {path}")
    try:
        return yaml.load(file.read(""), _Loader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
