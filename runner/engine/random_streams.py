"""Random numbers that hang on what they are for alone: a stream, a place in it, and a lane there.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), used as
a counter-based generator: nothing is kept between two draws.
"""

import numpy as np
import numpy.typing as npt

_GOLDEN = 0x9E3779B97F4A7C15


def split_mix(
    seeds: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """The numbers that SplitMix64 gives from `seeds` at `counters`; the two broadcast."""
    with np.errstate(over="ignore"):
        z = seeds + (counters + np.uint64(1)) * np.uint64(_GOLDEN)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z


def exponentials(
    streams: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64], count: int
) -> npt.NDArray[np.float32]:
    """`count` numbers from the exponential distribution for each stream and counter; (B, count).

    All are above zero, and as many more would not change the first ones.
    """
    seeds = split_mix(streams, counters)[:, None]
    numbers = split_mix(seeds, np.arange(count, dtype=np.uint64))
    # 52 bits and a half: a float64 has room for them, and neither 0 nor 1 comes up.
    uniforms = ((numbers >> np.uint64(12)) + 0.5) * 2.0**-52
    drawn: npt.NDArray[np.float32] = (-np.log(uniforms)).astype(np.float32)
    return drawn
