"""Several command lines of `python -m pipeline` in one process, and so in one JVM, one after the other.

    python -m tests.support.commands '["preprocess", "IN", "OUT", "--dataset", "messages"]' ...

Prints for each the sentence that it was refused with, or an empty line.
"""

import json
import sys
from unittest.mock import patch

from kanyun.errors import UserError
from pipeline.__main__ import main


def refusal(arguments: list[str]) -> str:
    with patch.object(sys, "argv", ["pipeline", *arguments]):
        try:
            main()
        except UserError as error:
            return str(error)
    return ""


if __name__ == "__main__":
    print("\n".join(["", *[refusal(json.loads(line)) for line in sys.argv[1:]]]))
