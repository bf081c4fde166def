"""The emulator itself: it computes what CUDA defines, and it notices what is wrong with a kernel.

Kernels are csrc/emulator/selftest.cuh; oracles are numpy. A mutant is the same file with one line changed per kernel.
"""

import re
import subprocess

import emulator
import numpy as np
import pytest
from emulator import EmulatorFailed, MutantError, build, outcome, run

F32, I32, U32, I64 = np.float32, np.int32, np.uint32, np.int64
SEEDS = range(12)
KINDS = {"plain": {}, "sanitized": {"sanitize": True}, "races": {"races": True}, "ucontext": {"define": ["MR1_EMU_UCONTEXT"]}}


def floats(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(F32)


def ints(n, low, high):
    return np.random.default_rng(n).integers(low, high, n).astype(I32)


def case(number, *more):
    return np.array([number, *more], I64)


# name -> (arrays in, dtype out, expected)
def row_sums():
    x = floats(7, 301)
    return [case(0, 7, 301, 3), x], F32, x.astype(np.float64).sum(1)


def neighbours():
    x = floats(3, 128)
    padded = np.pad(x, ((0, 0), (1, 1)))
    return [case(1), x], F32, (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]).ravel()


def shuffles():
    x = ints(32, -(2**31), 2**31 - 1)
    lane = np.arange(32)
    out = np.empty((4, 6, 32, 32), I32)
    for w in range(6):
        width = 1 << w
        first = lane // width * width
        last = first + width - 1
        for by in range(32):
            # The definitions of shfl.sync's modes idx, up, down and bfly: out of range means the lane's own value.
            sources = [first + by % width, lane - by, lane + by, lane ^ by]
            inside = [lane >= 0, sources[1] >= first, sources[2] <= last, sources[3] <= last]
            for kind in range(4):
                out[kind, w, by] = x[np.where(inside[kind], sources[kind], lane)]
    return [case(2), x], I32, out.ravel()


def halves():
    x = ints(32, -50, 50)
    half = x.reshape(2, 16)
    votes = [int("".join("1" if v > 0 else "0" for v in half[h][::-1]), 2) << 16 * h for h in range(2)]
    rows = [votes, half.sum(1), half.max(1)]
    return [case(3), x], U32, np.concatenate([np.repeat(np.array(r, I64), 16) for r in rows]).astype(U32)


def pipeline():
    x = floats(9, 64)
    return [case(4), x], F32, 2 * x[:, ::-1].ravel()


def early_exit():
    x = floats(160)
    return [case(5), x], F32, x[::-1]


def reverse_vectors():
    x = floats(96, 4)
    return [case(6), x], F32, x[::-1].ravel()


def histogram():
    x = ints(1000, 0, 37)
    return [case(7, 37, 4), x], I32, np.bincount(x, minlength=37)


def warp_mailbox():
    x = ints(4, -9, 9)
    return [case(8), x], I32, np.repeat(x, 32)


def positions():
    shape = (2, 3, 2, 8, 4, 2)
    blocks, threads = 12, 64
    return [case(9, *shape)], I32, np.stack([np.repeat(np.arange(blocks), threads), np.tile(np.arange(threads), blocks)], 1).ravel()


def round_trip():
    x = np.concatenate([floats(200), np.array([0.0, -0.0, 65504, 65520, 1e-8, 3e38, np.inf, -np.inf, 1.00390625, 1.01171875], F32)])
    with np.errstate(over="ignore"):
        return [case(10), x], F32, np.concatenate([emulator.from_bf16(emulator.to_bf16(x)), x.astype(np.float16).astype(F32)])


def last_block():
    x = ints(32 * 5, -99, 99)
    return [case(12), x], I32, [x.sum()]


def hand_over():
    x = floats(64, 16)
    return [case(13), x], F32, np.roll(x, -1, 0).ravel()


def chain():
    return [case(20, 96)], I32, np.arange(96)[::-1]


def group_sums():
    x = ints(384, -99, 99)
    return [case(21), x], I64, np.repeat(x.reshape(3, 128).sum(1), 128)


def copies():
    x = ints(64 * 6, -99, 99)
    return [case(22), x], I32, x


def queue_order():
    return [case(23, 20)], I32, np.arange(20)


KERNELS = [
    row_sums, neighbours, shuffles, halves, pipeline, early_exit, reverse_vectors, histogram, warp_mailbox, positions, round_trip,
    last_block, hand_over, chain, group_sums, copies, queue_order,
]  # fmt: skip


def agrees(got, want, dtype):
    return np.allclose(got, want, rtol=0, atol=1e-4 if dtype is F32 else 0, equal_nan=False)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compute_what_cuda_defines(kind, kernel):
    exe = build("selftest", **KINDS[kind])
    arrays, dtype, want = kernel()
    for seed in SEEDS if kind == "plain" else range(4):
        (got,) = run(exe, arrays, seed, dtypes=[dtype])
        if kernel is round_trip:
            np.testing.assert_array_equal(got, want)  # infinities too
        else:
            assert agrees(got, want, dtype), f"seed {seed}"


def test_a_seed_stands_for_one_order_and_seeds_differ():
    exe = build("selftest")
    orders = [run(exe, [case(11, 256)], seed, dtypes=[I32])[0] for seed in (0, 1, 2, 2)]
    assert all(sorted(order) == list(range(256)) for order in orders)
    assert np.array_equal(orders[2], orders[3])
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])


def removed(line):
    """The statement in front of the comment goes; the comment, by which it was found, stays."""
    return line, "  //" + line.partition("//")[2]


FILE, HOST = "emulator/selftest.cuh", "emulator/run_selftest.cpp"
# Programs, each with one broken line per kernel.
MUTANTS = {
    "first": {
        FILE: [
            removed("__syncthreads();  // [mutant] partial sums are complete"),
            removed("tile[0] = 0.0f;  // [mutant] the left edge"),
            ("__ballot_sync(0xffff0000u, x[lane] > 0);  // [mutant]", "__ballot_sync(0xffffff00u, x[lane] > 0);  // [mutant]"),
            removed("if (s >= 2) bar_sync(3 + s % 2, 128);  // [mutant]"),
            removed("__syncthreads();  // [mutant] all are counted"),
            removed("__syncwarp();  // [mutant] the number is there"),
            removed("__threadfence();  // [mutant] others' sums"),
            removed("__syncthreads();  // [mutant] all lie on the desk"),
        ],
        HOST: [
            removed('mr1_emu::wait_until([&] { return done[half] > step; }, "copy", &done[half]);  // [mutant]'),
            ("return *turn == n - 1 - t;", "return *turn == n - t;"),
            ("if (threadIdx.x == 200) mr1_emu::yield();", "if (threadIdx.x == 200) return;"),
        ],
    },
    "second": {
        FILE: [
            removed("__syncthreads();  // [mutant] everybody has read them"),
            removed("bar_sync(1 + s % 2, 128);  // [mutant] the buffer is full"),
            ("if (row >= rows) return;  // [mutant]", "if (threadIdx.x == 7) return;  // [mutant]"),
            ("if (threadIdx.x % 32 == 0) box[warp] = x[warp];", "if (threadIdx.x % 32 < 2) box[warp] = x[warp];"),
        ],
        HOST: removed("__syncthreads();  // [mutant] the tile may be overwritten"),
    },
    "third": {
        FILE: [
            ("__syncthreads();  // [mutant] partial sums are complete", "if (threadIdx.x < 64) __syncthreads();"),
            removed("if (s + 2 < steps) bar_arrive(3 + s % 2, 128);  // [mutant] give it back"),
            ("__syncwarp();  // [mutant] the number is there", "if (threadIdx.x != 33) __syncwarp();"),
            (
                "__syncthreads();  // [mutant] all are counted",
                "if (threadIdx.x < 32) __syncthreads();\n  if (threadIdx.x >= 32) __syncthreads();",
            ),
            ("if (row >= rows) return;  // [mutant]", "if (row >= rows || threadIdx.x == 5) return;\n  __syncwarp();  //"),
        ],
    },
    "bounds": {
        FILE: [
            ("+ i);  // [mutant] off by one", "+ i + 1);"),
            ("__shared__ float tile[2 * Threads + 2];", "__shared__ float tile[2 * Threads + 1];"),
            removed("if (row >= rows) return;  // [mutant]"),
            ("(x + 4 * t);  // [mutant] alignment", "(x + 4 * t + (t ? 0 : 1));"),
        ],
    },
    "more bounds": {
        FILE: [
            ("for (int w = 0; w < Threads / 32; ++w) total", "for (int w = 0; w <= Threads / 32; ++w) total"),
            ("tile[n - 1 - t];  // [mutant] shared index", "tile[n - t];"),
            ("MR1_SHARED(int, box, 4);", "MR1_SHARED(int, box, 3);"),
        ],
    },
}


@pytest.mark.parametrize(
    ("mutant", "kernel"),
    [
        ("first", row_sums), ("first", pipeline), ("first", histogram), ("first", warp_mailbox), ("first", copies), ("first", hand_over),
        ("second", row_sums), ("second", pipeline), ("second", copies),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)  # fmt: skip
def test_missing_synchronisation_gives_wrong_numbers_for_some_order(mutant, kernel):
    exe = build("selftest", mutate=MUTANTS[mutant])
    arrays, dtype, want = kernel()
    results = [outcome(exe, arrays, seed, [dtype]) for seed in range(24)]
    wrong = [isinstance(r, str) or not agrees(r[0], want, dtype) for r in results]
    assert sum(wrong) >= 3, wrong


@pytest.mark.parametrize(
    ("mutant", "kernel", "words"),
    [
        ("first", row_sums, ("race: thread", r"\(selftest.cuh:\d+\)", "of partial \\(16 bytes\\)")),
        ("first", pipeline, ("race: thread .* of buffers|bar_arrive 1: comes twice",)),
        ("first", histogram, ("race: thread", "changes atomically")),
        ("first", warp_mailbox, ("race: thread",)),
        ("first", hand_over, ("race: thread", "of desk")),
        ("first", last_block, ("race: thread 0", "of another block", "global memory")),
        ("first", copies, ("race: .*asynchronous work|the block ends before its asynchronous work",)),
        ("second", row_sums, ("race: thread",)),
        ("second", pipeline, ("race: thread .* of buffers|bar_arrive [1-4]: comes twice",)),
        ("second", warp_mailbox, ("race: thread", "writes")),
        ("second", copies, ("race:", "asynchronous work")),
    ],
    ids=lambda v: getattr(v, "__name__", v if isinstance(v, str) else ""),
)
def test_missing_synchronisation_is_reported_as_a_race_for_every_order(mutant, kernel, words):
    exe = build("selftest", races=True, mutate=MUTANTS[mutant])
    arrays, _, _ = kernel()
    for seed in SEEDS:
        said = run(exe, arrays, seed, expect_failure=True)
        assert all(re.search(w, said) for w in words), said


@pytest.mark.parametrize(
    ("mutant", "kernel", "words"),
    [
        ("first", halves, ("__ballot_sync", "mask 0xffffff00")),
        ("first", chain, ("deadlock", r"threads 0-95 wait at my turn \(run_selftest.cpp:")),
        ("first", group_sums, ("warpgroup 1", "exited")),
        ("third", row_sums, ("at __syncthreads in selftest.cuh:", "others are at the one in selftest.cuh:")),
        ("third", pipeline, ("deadlock", r"threads 0-63 wait at bar_sync 3 \(selftest.cuh:\d+\), 64 of 128 have come", "threads 64-127 wait at bar_sync 1")),
        ("third", warp_mailbox, ("thread 33", "wait for it in a warp operation")),
        ("third", histogram, ("divergent barrier", "at the one in selftest.cuh:")),
        ("third", early_exit, ("thread 5 .* exits, while lanes of its warp wait|__syncwarp: the mask 0xffffffff names lanes 0x00000020",)),
    ],
    ids=lambda v: getattr(v, "__name__", v if isinstance(v, str) else ""),
)
def test_wrong_use_of_barriers_and_warps_is_named(mutant, kernel, words):
    exe = build("selftest", mutate=MUTANTS[mutant])
    arrays, _, _ = kernel()
    said = [run(exe, arrays, seed, expect_failure=True) for seed in SEEDS]
    assert any(all(re.search(w, text) for w in words) for text in said), said[0]


@pytest.mark.parametrize(
    ("mutant", "kernel", "words"),
    [
        ("bounds", row_sums, ("heap-buffer-overflow", "READ of size 4")),
        ("bounds", neighbours, (r"out of bounds for type 'float \[129\]'",)),
        ("bounds", early_exit, ("heap-buffer-overflow",)),
        ("bounds", reverse_vectors, ("misaligned address", "16 byte alignment")),
        ("more bounds", row_sums, ("selftest.cuh", "row_sums")),
        ("more bounds", reverse_vectors, ("heap-buffer-overflow", "READ of size")),
        ("more bounds", warp_mailbox, ("warp_mailbox",)),
    ],
    ids=lambda v: getattr(v, "__name__", v if isinstance(v, str) else ""),
)
def test_accesses_out_of_bounds_and_misaligned_are_reported(mutant, kernel, words):
    exe = build("selftest", sanitize=True, mutate=MUTANTS[mutant])
    arrays, _, _ = kernel()
    said = run(exe, arrays, 0, expect_failure=True)
    assert all(re.search(w, said) for w in words), said


def test_shared_memory_nobody_wrote_is_nan():
    exe = build("selftest", mutate=MUTANTS["first"])
    arrays, dtype, want = neighbours()
    (got,) = run(exe, arrays, 0, dtypes=[dtype])
    assert np.isnan(got[::128]).all()  # each block's first sum had tile[0] in it
    rest = np.arange(len(want)) % 128 != 0
    assert agrees(got[rest], want[rest], dtype)


def test_launches_are_checked():
    said = run(build("selftest"), [case(24)], expect_failure=True)
    assert "102400 bytes of dynamic shared memory" in said
    assert "invalid block (0, 1, 1)" in run(build("selftest"), [case(11, 0)], expect_failure=True)
    assert "invalid block (1025, 1, 1)" in run(build("selftest"), [case(11, 1025)], expect_failure=True)


def test_a_block_of_1024_threads():
    (order,) = run(build("selftest"), [case(11, 1024)], 3, dtypes=[I32])
    assert sorted(order) == list(range(1024))


def test_arrays_must_be_those_the_harness_takes():
    exe = build("selftest")
    assert "there are no more arrays" in run(exe, [case(8)], expect_failure=True)
    assert "input 1 was not used" in run(exe, [case(11, 4), np.zeros(3)], expect_failure=True)
    with pytest.raises(EmulatorFailed, match="gave 1 arrays, 2 were expected"):
        run(exe, [case(11, 4)], dtypes=[I32, I32])
    with pytest.raises(EmulatorFailed, match="expected a report, found exit status 0"):
        run(exe, [case(11, 4)], expect_failure=True)


def test_a_mutant_must_replace_one_place_and_a_program_must_compile():
    with pytest.raises(MutantError, match="occurs 0 times"):
        build("selftest", mutate={FILE: ("no such line in the file", "")})
    with pytest.raises(MutantError, match="must occur once, it occurs"):
        build("selftest", mutate={FILE: ("__syncthreads();", "")})
    with pytest.raises(EmulatorFailed, match="no_such_function"):
        build("selftest", mutate={FILE: ("__syncwarp();  // [mutant]", "no_such_function();  // [mutant]")})


def test_a_changed_file_is_compiled_again(tmp_path, monkeypatch):
    """The cache goes by what files hold: here a copy of csrc/, of which one line changes."""
    tree = emulator._mutant(tmp_path, {})
    monkeypatch.setattr(emulator, "CSRC", tree)
    monkeypatch.setattr(emulator, "CACHE", tmp_path / "cache")
    first = build("selftest")
    assert build("selftest") == first
    path = tree / FILE
    path.write_text(path.read_text().replace("y[threadIdx.x] = box[warp];", "y[threadIdx.x] = box[warp] + 1;"))
    second = build("selftest")
    assert second != first
    assert not first.exists()
    arrays, dtype, want = warp_mailbox()
    assert np.array_equal(run(second, arrays, dtypes=[dtype])[0], want + 1)


def test_the_same_file_is_cuda(tmp_path):
    """nvcc takes selftest.cuh as it is: what the emulator runs is CUDA and no dialect of its own."""
    nvcc = emulator.nvcc()
    source = tmp_path / "selftest.cu"
    source.write_text(
        '#include "emulator/selftest.cuh"\n'
        "using namespace mr1::selftest;\n"
        "void launch(float* y, const float* x, int* n, cudaStream_t stream) {\n"
        "  MR1_LAUNCH((row_sums<128>), dim3(4), 128, 0, stream, y, x, 3, 4);\n"
        "  MR1_LAUNCH(neighbours<64>, 1, 64, 0, stream, y, x);\n"
        "  MR1_LAUNCH(reverse_vectors, 1, 96, 96 * 16, stream, y, x);\n"
        "  MR1_LAUNCH(positions, dim3(1, 2, 3), dim3(4, 5, 6), 0, nullptr, n);\n"
        "}\n"
    )
    command = [nvcc, "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a", f"-I{emulator.CSRC}", f"-I{emulator.CSRC / 'include'}"]
    done = subprocess.run([*command, "-Werror", "all-warnings", "-c", str(source), "-o", str(tmp_path / "o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
