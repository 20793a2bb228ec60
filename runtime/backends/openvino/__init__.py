"""The OpenVINO engine. Importing OpenVINO reports that to Google Analytics by openvino_telemetry, unless its
user has declined; it does without where that cannot be imported, as here: tightfit reports nothing."""

import sys
from typing import Any

_modules: dict[str, Any] = sys.modules
_modules.setdefault("openvino_telemetry", None)
