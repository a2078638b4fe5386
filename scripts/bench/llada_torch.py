"""Fast-dLLM v1's dual-cache decoding of LLaDA in plain eager PyTorch: the other side of llada_cpu.

    python llada_torch.py FOLDER THREADS       (torch, numpy and safetensors are all it needs)

Written after the published algorithm (arXiv 2505.22618; NVlabs/Fast-dLLM, v1/llada) as its authors
run it: a Python loop over forward passes, scaled_dot_product_attention, a cache of keys before RoPE
that is turned anew in every pass, confidences from a float64 softmax over every position that the
pass scored. Requests come as lines of JSON on stdin; answers go to stdout.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


def main() -> None:
    """Answers requests until stdin ends."""
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    model = LLaDA(folder)
    jobs = {"decode": model.decode, "gemm": gemm, "about": about}
    for line in sys.stdin:
        request = json.loads(line)
        with torch.inference_mode():
            answer = jobs[request.pop("do")](**request)
        print(json.dumps(answer), flush=True)


def about() -> dict[str, Any]:
    """Version and threads."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def gemm(rows: int, inner: int, columns: int, count: int, repeat: int) -> list[float]:
    """Seconds of `count` products [rows, inner] x [inner, columns], each with its own weights."""
    x = torch.randn(rows, inner)
    weights = torch.randn(count, columns, inner)  # as a Linear has them
    found = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        for weight in weights:
            F.linear(x, weight)
        found.append(time.perf_counter() - start)
    return found[1:]


class LLaDA:
    """The model and its decoder; `seconds` are spent on each part of the last call."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "config.json").read_text())
        self.layers, self.heads = config["n_layers"], config["n_heads"]
        self.size = config["d_model"] // config["n_heads"]
        self.eps, self.mask_id = config["rms_norm_eps"], config["mask_token_id"]
        self.weights = load_file(folder / "model.safetensors")
        length = config["max_sequence_length"]
        frequency = config["rope_theta"] ** -(torch.arange(0, self.size, 2) / self.size)
        angle = torch.arange(length)[:, None] * frequency
        angle = torch.cat([angle, angle], dim=-1)
        self.cos, self.sin = angle.cos(), angle.sin()

    def decode(self, prompt, new_tokens: int, block: int, threshold=None, steps=None):
        """The canvas after decoding, forward passes, and seconds, in all and by part."""
        self.seconds = {"wide": 0.0, "narrow": 0.0, "scores": 0.0}
        begun = time.perf_counter()
        given = torch.tensor(prompt)
        x = torch.full((len(given), given.shape[1] + new_tokens), self.mask_id)
        x[:, : given.shape[1]] = given
        passes = [0, 0]
        for start in range(given.shape[1], x.shape[1], block):
            end = start + block
            quota = _quota(x[:, start:end] == self.mask_id, steps) if steps else None
            logits, cache = self.forward(x, "wide")
            masked = x == self.mask_id
            masked[:, end:] = False
            self._write(x, logits, masked, quota[:, 0] if steps else None, threshold)
            passes[0] += 1
            where = torch.zeros_like(x, dtype=torch.bool)
            where[:, start:end] = True
            step = 1
            while (x[:, start:end] == self.mask_id).any():
                own = x[:, start:end]
                logits, cache = self.forward(own, "narrow", cache, where, start)
                masked = own == self.mask_id
                self._write(own, logits, masked, quota[:, step] if steps else None, threshold)
                passes[1] += 1
                step += 1
        total = time.perf_counter() - begun
        return {"tokens": x.tolist(), "passes": passes, "seconds": total, "parts": self.seconds}

    def forward(self, tokens, kind, cache=None, where=None, first=0):
        """Scores of `tokens` [B, T], and the keys and values of the whole canvas, by layer."""
        begun = time.perf_counter()
        w, kept = self.weights, []
        hidden = F.embedding(tokens, w["model.transformer.wte.weight"])
        for layer in range(self.layers):
            name = f"model.transformer.blocks.{layer}."
            x = self._norm(hidden, w[name + "attn_norm.weight"])
            q, k, v = (
                F.linear(x, w[f"{name}{part}_proj.weight"])
                .view(*x.shape[:2], self.heads, self.size)
                .transpose(1, 2)
                for part in "qkv"
            )
            if cache is not None:
                for row in range(len(tokens)):
                    at = where[row].nonzero(as_tuple=True)[0]
                    cache[layer][0][row, :, at] = k[row]
                    cache[layer][1][row, :, at] = v[row]
                k, v = cache[layer]
            kept.append((k, v))
            mixed = F.scaled_dot_product_attention(self._turn(q, first), self._turn(k, 0), v)
            mixed = mixed.transpose(1, 2).reshape(*x.shape)
            hidden = hidden + F.linear(mixed, w[name + "attn_out.weight"])
            x = self._norm(hidden, w[name + "ff_norm.weight"])
            x = F.silu(F.linear(x, w[name + "ff_proj.weight"])) * F.linear(
                x, w[name + "up_proj.weight"]
            )
            hidden = hidden + F.linear(x, w[name + "ff_out.weight"])
        hidden = self._norm(hidden, w["model.transformer.ln_f.weight"])
        ended = time.perf_counter()
        logits = F.linear(hidden, w["model.transformer.ff_out.weight"])
        self.seconds[kind] += ended - begun
        self.seconds["scores"] += time.perf_counter() - ended
        return logits, kept

    def _write(self, x, logits, masked, quota, threshold) -> None:
        """Commits tokens to `x` in place: the quota's most confident, or all over the threshold."""
        begun = time.perf_counter()
        best = logits.argmax(dim=-1)
        probs = F.softmax(logits.to(torch.float64), dim=-1)
        confidence = probs.gather(-1, best[..., None])[..., 0]
        confidence = torch.where(masked, confidence, -torch.inf)
        if quota is None:
            chosen = masked & (confidence >= threshold)
            rows = torch.arange(len(x))
            chosen[rows, confidence.argmax(dim=-1)] |= masked.any(dim=-1)
        else:
            chosen = torch.zeros_like(masked)
            for row in range(len(x)):
                chosen[row, confidence[row].topk(int(quota[row])).indices] = True
            chosen &= masked
        x[chosen] = best[chosen]
        self.seconds["scores"] += time.perf_counter() - begun

    def _norm(self, x, scale):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return scale * wide.to(x.dtype)

    def _turn(self, x, first: int):
        """RoPE of [B, N, T, H] at positions first, first + 1, ..."""
        cos, sin = (table[first : first + x.shape[2]] for table in (self.cos, self.sin))
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin


def _quota(masked, steps: int):
    """int64[B, steps]: positions to write at each step, the remainder in the first ones."""
    total = masked.sum(dim=1, keepdim=True)
    return total // steps + (torch.arange(steps) < total % steps)


if __name__ == "__main__":
    main()
