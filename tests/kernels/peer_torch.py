#!/usr/bin/env python3
"""The comparator of bench_cuda: torch's full attention at decode (32 q / 8 kv heads x 128, bf16), by cuDNN and by flash, in a
replayed graph that rotates over several inputs. Prints JSON lines {"batch", "tokens", "us": {backend: median}}.
Needs torch with CUDA; run it beside bench_cuda on the same machine."""
import json

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

REPLAYS, CALLS, BYTES = 21, 8, 12 << 30
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
SHAPES = [(1, 8192), (1, 16384), (1, 32768), (1, 131072), (1, 262144), (1, 524288), (1, 1048576), (64, 32768)]


def captured(call):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            call(i)
    return graph


def median_us(graph):
    times = []
    for i in range(REPLAYS + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return sorted(times[3:])[REPLAYS // 2]


def measure(batch, tokens):
    def random(heads, length):
        return torch.randn(batch, heads, length, 128, device="cuda", dtype=torch.bfloat16)
    layers = max(1, min(CALLS, BYTES // (batch * tokens * 4096)))
    q, kv = random(32, 1), [(random(8, tokens), random(8, tokens)) for _ in range(layers)]
    result = {}
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            result[name] = median_us(captured(
                lambda i: F.scaled_dot_product_attention(q, *kv[i % layers], enable_gqa=True)))
    return result


def main():
    print(torch.__version__, torch.cuda.get_device_name(), "cuDNN", torch.backends.cudnn.version(), flush=True)
    for batch, tokens in SHAPES:
        print(json.dumps({"batch": batch, "tokens": tokens, "us": measure(batch, tokens)}), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
