"""What runs on your machine."""

import os

# Else ONNX Runtime 1.32 sends events to its maker, and keeps an id in the cache folder, from its import on.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
