"""What commands do not import, and that it is there all the same when something looks for it."""

from __future__ import annotations

import subprocess
import sys
import threading
from importlib.abc import Loader
from types import ModuleType

import pytest
from tightfit.runtime import lean

BEGIN = "from tightfit.runtime import lean; lean.begin(); import sys\n"


def ran(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_painting_imports_no_compiler_and_nothing_distributed(tmp_path):
    code = (
        "import atexit, sys\n"
        "def tell(): print(sorted({'torch._dynamo.eval_frame', 'torch.distributed.tensor', "
        "'scipy.stats._stats_py', 'diffusers.models.transformers.transformer_flux', 'torch.optim.adam', "
        "'torch.distributions.normal', 'transformers.image_processing_utils', 'requests.api', 'sympy', "
        "'torch._refs'} "
        "& sys.modules.keys()))\n"
        "atexit.register(tell)\n"
        "sys.argv[1:] = ['a', '--steps', '2', '--width', '64', '--height', '64', '-o', "
        f"{str(tmp_path / 'a.png')!r}]\n"
        "from tightfit.__main__ import main; main()"
    )
    assert ran(code).splitlines()[-1] == "[]"
    assert (tmp_path / "a.png").stat().st_size


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
        "assert 'diffusers.models.unets.unet_1d' not in sys.modules\n"
        "from diffusers.models.unets import UNet2DConditionModel, UNet1DModel\n"
        "assert a is UNet2DConditionModel\n"
        "from transformers import CLIPTextModel, CLIPTextConfig; assert b is CLIPTextModel\n"
        "import torch; from torch.optim import Adam; assert torch.distributions.Normal and torch.testing\n"
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


class Slow(Loader):
    """A package that fails at first; then another thread looks into it while this one reads it."""

    def __init__(self) -> None:
        self.times, self.seen = 0, []

    def exec_module(self, module: ModuleType) -> None:
        self.times += 1
        if self.times == 1:
            raise MemoryError
        self.other = threading.Thread(target=lambda: self.seen.append(getattr(module, "name", None)))
        self.other.start()
        self.other.join(0.2)  # in which it would come back without
        module.__dict__["name"] = "it"


def test_two_threads_look_at_what_was_put_off_and_failed_once():
    face, loader = lean._Face("tightfit_made_up"), Slow()
    face.__dict__["_unread"] = loader
    with pytest.raises(MemoryError):
        face.name  # noqa: B018
    assert face.name == "it"
    loader.other.join()
    assert (loader.seen, loader.times) == (["it"], 2)
