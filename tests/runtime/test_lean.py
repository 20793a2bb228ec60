"""What commands do not import, and that it is there all the same when something looks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tightfit.runtime.machine import remembered

BEGIN = "from tightfit.runtime import lean; lean.begin(); import sys\n"


def ran(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_painting_imports_no_compiler_and_planning_again_no_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ways = "--precision fp32 --residency staged --attention sdpa --tiling whole"
    asked = f"--width 64 --height 64 --guidance-scale 1 {ways}"
    code = (
        "import atexit, sys\n"
        "def tell(): print(sorted({'torch._dynamo.eval_frame', 'torch.distributed.tensor', "
        "'scipy.stats._stats_py', 'diffusers.models.transformers.transformer_flux', 'torch.optim.adam', "
        "'torch.distributions.normal', 'transformers.image_processing_utils', 'requests.api', 'sympy', "
        "'torch._refs', 'jinja2', 'unittest.case', 'torch.utils.data.dataloader', "
        "'diffusers.hooks.faster_cache', 'diffusers.quantizers.base', 'transformers.quantizers.base', "
        "'transformers.models.auto.modeling_auto', 'transformers.loss.loss_for_object_detection', "
        "'huggingface_hub.community'} "
        "& sys.modules.keys()))\n"
        "atexit.register(tell)\n"
        f"sys.argv[1:] = ['a', '--steps', '2', '-o', {str(tmp_path / 'a.png')!r}, *{asked.split()}]\n"
        "from tightfit.__main__ import main; main()"
    )
    assert ran(code).splitlines()[-1] == "[]"
    assert (tmp_path / "a.png").stat().st_size
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))\n"
        f"sys.argv[1:] = ['plan', *{asked.split()}]\n"
        "from tightfit.__main__ import main; main()"
    )
    said = ran(code)
    assert "fp32, staged" in said
    assert said.splitlines()[-1] == str(not remembered._only_cpu())  # asked for the GPU that may be there


def test_what_was_put_off_comes_when_it_is_looked_for():
    """In one process, as each imports torch anew."""
    ran(
        BEGIN + "import importlib.util\n"
        "if importlib.util.find_spec('scipy'):\n"
        "    import scipy.stats; assert abs(scipy.stats.norm.cdf(0) - 0.5) < 1e-9\n"
        "    from scipy import integrate; assert abs(integrate.quad(lambda x: x, 0, 1)[0] - 0.5) < 1e-9\n"
        "from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel as a\n"
        "from transformers.models.clip.modeling_clip import CLIPTextModel as b\n"
        "assert 'torch._dynamo.eval_frame' not in sys.modules\n"
        "from huggingface_hub import HfApi, snapshot_download; import huggingface_hub.hf_api as hub\n"
        "assert not hasattr(HfApi, 'model_info') and isinstance(HfApi(), hub.HfApi)\n"
        "try: snapshot_download('no/model', local_files_only=True); assert False\n"
        "except OSError: assert hub.HfApi.model_info\n"
        "assert 'diffusers.models.unets.unet_1d' not in sys.modules\n"
        "from diffusers.models.unets import UNet2DConditionModel, UNet1DModel\n"
        "assert a is UNet2DConditionModel\n"
        "from transformers import CLIPTextModel, CLIPTextConfig; assert b is CLIPTextModel\n"
        "import torch; from torch.optim import Adam; assert torch.distributions.Normal and torch.testing\n"
        "from torch.utils.data import DataLoader; assert len(DataLoader([1, 2])) == 2\n"
        "import unittest.mock; assert unittest.mock.patch and unittest.TestCase\n"
        "from transformers import AutoModel; assert AutoModel.from_config\n"
        "from diffusers.quantizers import PipelineQuantizationConfig, DiffusersAutoQuantizer as c\n"
        "assert c.from_config\n"
        "row = torch.empty(2, device='meta')\n"
        "assert torch.Generator().manual_seed(1)\n"
        "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item() == 2\n"
        "assert row.index_select(0, row.long()).shape == (2,) and not lean.have_meta_kernels()\n"
        "import diffusers, transformers; assert diffusers.StableDiffusionPipeline\n"
        "assert transformers.__version__ and transformers.AutoImageProcessor.from_pretrained\n"
        "from transformers.processing_utils import ProcessorMixin; import requests; assert requests.get\n"
        "assert not hasattr(sys.modules['diffusers.models.unets'], 'NoSuchNet')\n"
        "assert torch._dynamo.allow_in_graph(len) is not None and 'torch._dynamo.eval_frame' in sys.modules"
    )


# `late` and `later` are put off. `late` fails at first; once it is read, another thread looks into it.
FAILING = {
    "late/__init__": "import signs\nif signs.fails: raise signs.fails.pop()\nsigns.look()\nname = 'it'",
    "signs": """
import threading
fails, seen = [MemoryError()], []
def look():
    global other
    import late
    other = threading.Thread(target=lambda: seen.append(getattr(late, "name", None)))
    other.start()
    other.join(0.2)  # in which it would come back without
""",
    "main": """
import late, signs
try:
    late.name
except MemoryError:
    assert late.name == "it"
    signs.other.join()
    print(signs.seen)
""",
}
# What reads `late` imports two modules that other threads import already: one of them looks into `late` and
# into another package, the other is being found, for which `late` is to be read first.
IN_CIRCLES = {
    "late/__init__": """
import signs
first = "it"
signs.reading.set()
signs.looking.wait(), signs.finding.wait()
import middle, late.child
last = True
""",
    "late/child": "name = 'child'",
    "later/__init__": "name = 'too'",
    "middle": """
import late, later, signs
signs.looking.set(), signs.reading.wait()
seen = later.name, late.first
""",
    "signs": "from threading import Event\nreading, looking, finding = Event(), Event(), Event()",
    "main": """
import importlib, sys, threading
import late, signs
class Finding:
    def find_spec(name, path, target=None):
        if name == "late.child":
            signs.finding.set()
sys.meta_path.insert(0, Finding)
def find():
    signs.reading.wait()
    importlib.import_module("late.child")
lean._COMPILER = "late"
others = [threading.Thread(target=importlib.import_module, args=["middle"]), threading.Thread(target=find)]
for other in others:
    other.start()
late.last
for other in others:
    other.join()
print([*sys.modules["middle"].seen, late.child.name])
""",
}


@pytest.mark.parametrize(
    ("files", "seen"),
    [(FAILING, ["it"]), (IN_CIRCLES, ["too", "it", "child"])],
    ids=["failing", "in circles"],
)
def test_two_threads_look_at_what_was_put_off(files, seen, tmp_path):
    for name, text in files.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    code = f"{BEGIN}from pathlib import Path\nlean.FACES = {{'late': dict, 'later': dict}}\n"
    code += f"sys.path.insert(0, {str(tmp_path)!r})\nexec(Path({str(tmp_path / 'main.py')!r}).read_text())"
    assert ran(code) == str(seen)
