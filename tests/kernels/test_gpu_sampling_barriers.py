"""Whether the tests of sampling on a GPU would see a barrier that is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime import _native
from runtime.ops.sampling import (
    score_gpu,
)
from tests.kernels.gpu_sampling_cases import (
    Batch,
    make_params,
    on_gpu,
    on_host,
)


class TestBarriers:
    """A test of the tests: without any one of its barriers, what the host execution sees of sampling is wrong."""

    @staticmethod
    def run(gpu):
        vocab_size, rng = 4500, np.random.default_rng(5)
        fields = [
            {},
            {"top_k": 50, "num_logprobs": 5},
            {"top_k": 4000},
            {"temperature": 0.0, "num_logprobs": 20},
            {"top_k": 1500, "top_p": 0.8, "min_p": 0.001},
            {"top_p": 0.9, "repetition_penalty": 1.3, "logit_bias": [(t, 1.0) for t in range(70)]},
            {"top_p": 0.95, "num_logprobs": 0, "min_tokens": 99, "stop_token_ids": list(range(40))},
        ]
        logits = np.stack([rng.standard_normal(vocab_size) * (1 + s % 2) for s in range(len(fields))])
        logits[3] = np.round(logits[3])
        logits = logits.astype(np.float32)
        histories = [rng.integers(0, vocab_size, 60).astype(np.int32) for _ in fields]
        params = [make_params(seed=s, **each) for s, each in enumerate(fields)]
        batch = Batch(gpu, logits, params, histories, [30] * len(fields))
        scores = on_gpu(gpu, np.zeros(len(fields), np.float32))
        rows = np.arange(len(fields), dtype=np.int32)
        tokens = on_gpu(gpu, np.stack(histories))
        score_gpu(on_gpu(gpu, logits), on_gpu(gpu, rows), on_gpu(gpu, rows), tokens, scores)
        outputs = [batch.sampled, batch.logprobs, batch.ranks, batch.top_ids, batch.top_logprobs]
        return [output.tobytes() for output in [*outputs, on_host(scores, np.float32)]]

    def is_noticed(self, gpu, site, want) -> bool:
        for seed in range(3):
            _native.simt_set_seed(seed)
            _native.simt_set_disabled_site(site)
            try:
                if self.run(gpu) != want:
                    return True
            except (RuntimeError, AssertionError):
                return True
            finally:
                _native.simt_set_disabled_site("")
                _native.simt_set_seed(0)
        return False

    def test_a_missing_one_is_noticed(self, gpu):
        if gpu.world != "simt":
            pytest.skip("only the host execution can leave a barrier out")
        _native.simt_take_visited_sites()
        want = self.run(gpu)
        sites = [site for site in _native.simt_take_visited_sites() if "sampling/cuda" in site]
        assert len(sites) >= 15
        unnoticed = [site for site in sites if not self.is_noticed(gpu, site, want)]
        # Blocks run one after another here, and races are looked for in shared memory alone.
        sources = Path(__file__).parents[2] / "csrc"
        for site in unnoticed:
            path, line = site.rsplit(":", 1)
            source = sources / "sampling" / "cuda" / Path(path).name
            assert "orders global memory only" in source.read_text().splitlines()[int(line) - 1], site
