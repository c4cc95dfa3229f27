"""The default config.json of every model type that the installed transformers can make, in one archive.

    python tests/conformance/make_configs.py configs-4.57.zip       # with transformers 4.57

Kept are those of transformers 4; the tests save each again with the installed one.
"""

from __future__ import annotations

import sys
import warnings
import zipfile
from pathlib import Path

from transformers import CONFIG_MAPPING


def main(archive: Path) -> None:
    warnings.simplefilter("ignore")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as written:
        for kind in sorted(CONFIG_MAPPING.keys()):
            try:
                text = CONFIG_MAPPING[kind]().to_json_string(use_diff=True)
            except Exception as error:  # some are made of other configs, or ask the hub
                print(f"{kind}: {type(error).__name__}")
                continue
            written.writestr(zipfile.ZipInfo(f"{kind}.json", (1980, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
