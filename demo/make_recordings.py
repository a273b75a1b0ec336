"""Simulates recordings of walkers and cuts them into windows that overlap: a laboratory where everything is known.

The walkers of make_demo.py are seen by its radar for minutes instead of seconds, several times each. Who somebody is
lies in the body and the gait: height, stride, step rate, arm swing, knees, echoes, a slight limp. What differs between
two recordings of one walker, and says nothing about the walker, is the start, the pace, the direction from which the
radar looks, arm swing and bend of the elbows on that day, the clutter of the room and the noise. Most of this drifts
within a recording, and further than it differs between recordings: a longer recording tells more of what may be.

    python demo/make_recordings.py --output laboratory
    python demo/make_recordings.py --output small --people 4 --windows 20 --image_size 32

The windows are written as laboratory/recording_1/ID_1/ID_1_recording_1_0001.jpg and so on: recording_1 is a folder
for --data_path. Neighbours overlap by 75 %. A recording is a function of (seed, walker, recording): a longer one goes
on where a shorter one ends.

Shapes: T radar pulses, P scatterers, A antennas, C columns of a spectrogram, S image size.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import make_demo
import numpy as np
from PIL import Image

NUM_WALKERS, NUM_RECORDINGS, NUM_WINDOWS = 31, 3, 240
IMAGE_SIZES = (32, 64, 128)  # a window shows the same time and the same speeds in each
OVERLAP = 0.75
SEEDS_APART = 1000  # of make_demo's numbered people, each seed has its own

# What a recording adds: pace and arm swing as factors, the aspect evenly to either side, the elbows in degrees. A pace
# changes stride and step rate alike, by its square root: their ratio is a trait of a person (Sekiya and Nagasaki 1998).
PACE_SD, ASPECT_DEGREES, ARM_SWING_SD, ELBOW_SD = 0.012, 5.0, 0.04, 1.5
LEAST_ELBOW = 5.0  # degrees
SHADOW_DB = 8.0  # which the torso takes from the far side where the radar looks straight from the side
NOISE_DB = (-19.5, -17.5)  # per pulse, relative to one torso scatterer
CLUTTER_DB = (-11.5, -9.5)  # of what stands still
FAN_DB, FAN_HERTZ = (-34.0, -30.0), (3.0, 9.0)  # of what turns, and how often it does
TOP_DB = (0.0, 0.6)  # how much louder than the loudest of its beginning the top of the colours of a recording is
# What changes within a recording: standard deviations, every DRIFT_SECONDS anew and in between on a straight line.
DRIFTS = {"pace": 0.045, "aspect": 8.0, "arm_swing": 0.10, "elbow": 3.5, "clutter_db": 1.5, "loudness_db": 1.2}
NUM_SCATTERERS, NUM_OF_TORSO = 71, 5  # of make_demo.body_points; then come those of the left and the right limbs
DRIFT_SECONDS, FADING_SECONDS = 4.0, 0.45
CHUNK_COLUMNS = 256  # simulated at a time, and never less, so that the end of a recording changes no bit before it


@dataclasses.dataclass(frozen=True)
class Circumstances:
    """Describes what belongs to one recording and not to the walker."""

    start: float  # strides
    pace: float  # factor on the walking speed
    aspect: float  # radians between the walk and the direction to the radar, to the left positive
    elevation: float  # radians by which the radar lies above the pelvis
    arm_swing: float  # factor
    elbow: float  # degrees more
    noise_db: float
    clutter_db: float
    fan_db: float
    fan_hertz: float
    top_db: float

    @staticmethod
    def draw(rng: np.random.Generator) -> "Circumstances":
        """Draws the circumstances of a recording."""
        return Circumstances(
            start=rng.uniform(0, 1),
            pace=float(np.exp(rng.normal(0, PACE_SD))),
            aspect=np.deg2rad(rng.uniform(-ASPECT_DEGREES, ASPECT_DEGREES)),
            elevation=rng.uniform(-0.02, 0.06),
            arm_swing=float(np.exp(rng.normal(0, ARM_SWING_SD))),
            elbow=rng.normal(0, ELBOW_SD),
            noise_db=rng.uniform(*NOISE_DB),
            clutter_db=rng.uniform(*CLUTTER_DB),
            fan_db=rng.uniform(*FAN_DB),
            fan_hertz=rng.uniform(*FAN_HERTZ),
            top_db=rng.uniform(*TOP_DB),
        )

    def of_the_day(self, who: make_demo.Person) -> make_demo.Person:
        """Returns the walker on the day of the recording."""
        return dataclasses.replace(
            who,
            cadence=who.cadence * self.pace**0.5,
            stride=who.stride * self.pace**0.5,
            arm_swing=who.arm_swing * self.arm_swing,
            elbow=max(LEAST_ELBOW, who.elbow + self.elbow),
        )


def walker(seed: int, number: int) -> make_demo.Person:
    """Returns the walker ID_<number> of a laboratory."""
    return make_demo.random_person(SEEDS_APART * (seed + 1) + number)


# --- one recording -----------------------------------------------------------------------------------------


def recording_db(seed: int, number: int, recording: int, num_columns: int) -> np.ndarray:
    """Simulates one recording of the walker of that number; returns dB [128 C], high speed on top.

    0 dB is the top of its colours.
    """
    of_day, of_drifts, of_fading = (np.random.default_rng([seed, number, recording, part]) for part in range(3))
    how = Circumstances.draw(of_day)
    who = how.of_the_day(walker(seed, number))
    num_chunks = -(-num_columns // CHUNK_COLUMNS)
    num_pulses = make_demo.STFT_WINDOW + make_demo.STFT_HOP * (num_chunks * CHUNK_COLUMNS - 1)
    seconds = np.arange(num_pulses) / make_demo.PULSES_PER_SECOND
    drifts = draw_drifts(of_drifts, seconds)
    # Where somebody walks faster for a while, the time of the gait runs faster.
    pace = np.exp(drifts["pace"])
    own_seconds = np.cumsum(pace) / make_demo.PULSES_PER_SECOND
    aspect = how.aspect + np.deg2rad(drifts["aspect"])
    closer = who.speed * np.cumsum(np.cos(aspect) * pace) / make_demo.PULSES_PER_SECOND  # to the radar, in m
    fading = Fading.draw(of_fading, seconds[-1])
    parts = []
    for chunk in range(num_chunks):
        first = chunk * CHUNK_COLUMNS * make_demo.STFT_HOP
        pulses = slice(first, first + make_demo.STFT_WINDOW + make_demo.STFT_HOP * (CHUNK_COLUMNS - 1))
        now = {name: values[pulses] for name, values in drifts.items()}
        ranges, amplitudes = scene(moved(who, now), how, own_seconds[pulses], aspect[pulses], closer[pulses])
        phasors = np.exp(-4j * np.pi / make_demo.WAVELENGTH_M * ranges) * amplitudes * ratio(now["loudness_db"])
        room = clutter(how, seconds[pulses], now["clutter_db"])
        signal = fading.sum_echoes(phasors, seconds[pulses]) + fading.clutter_phases[:, None] * room
        # The pulses that two chunks share hear other noise in each, as no column belongs to both.
        of_noise = np.random.default_rng([seed, number, recording, 3, chunk])
        noise = of_noise.standard_normal((2, *signal.shape)) * ratio(how.noise_db)
        parts.append(make_demo.spectrogram_db(signal + noise[0] + 1j * noise[1]))
    level = np.concatenate(parts, axis=1)[:, :num_columns]
    return level - np.percentile(level[:, : make_demo.IMAGE_SIZE], 99.5) - how.top_db


def ratio(level_db: Any) -> Any:
    """Returns the ratio of amplitudes that a level in dB stands for."""
    return 10 ** (level_db / 20)


def draw_drifts(rng: np.random.Generator, seconds: np.ndarray) -> dict[str, np.ndarray]:
    """Draws what changes within a recording, at these moments: name of DRIFTS -> [T] around 0."""
    at = seconds / DRIFT_SECONDS
    knots = rng.standard_normal((int(at[-1]) + 2, len(DRIFTS)))
    return {
        name: deviation * np.interp(at, np.arange(len(knots)), knots[:, place])
        for place, (name, deviation) in enumerate(DRIFTS.items())
    }


def moved(who: make_demo.Person, now: Mapping[str, np.ndarray]) -> make_demo.Person:
    """Returns a walker whose arms swing otherwise at each moment [T]."""
    changes: dict[str, Any] = {
        "arm_swing": who.arm_swing * np.exp(now["arm_swing"]),
        "elbow": np.maximum(LEAST_ELBOW, who.elbow + now["elbow"]),
    }
    return dataclasses.replace(who, **changes)


def scene(
    who: make_demo.Person, how: Circumstances, own_seconds: np.ndarray, aspect: np.ndarray, closer: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places a walker; returns the ranges of the scatterers [P T] in m, up to a constant, and their amplitudes [P T].

    The radar is far away: it sees how far the pelvis has come on its line of sight, and the body around it.
    """
    points, levels_db = make_demo.body_points(who, how.start + who.cadence * own_seconds, own_seconds)
    points[:, 0] -= who.speed * own_seconds
    to_radar = np.stack(
        [
            np.cos(aspect) * np.cos(how.elevation),
            np.sin(aspect) * np.cos(how.elevation),
            np.full_like(aspect, np.sin(how.elevation)),
        ]
    )
    ranges = -closer * np.cos(how.elevation) - np.einsum("pdt,dt->pt", points, to_radar)
    num_per_side = (NUM_SCATTERERS - NUM_OF_TORSO) // 2
    side = np.repeat([0, 1, -1], [NUM_OF_TORSO, num_per_side, num_per_side])
    shadow_db = SHADOW_DB * np.minimum(0, side[:, None] * np.sin(aspect))
    return ranges, ratio(levels_db[:, None] + shadow_db)


@dataclasses.dataclass(frozen=True)
class Fading:
    """Holds how each antenna sees each scatterer: phases of its own, and gains that fade as the aspect drifts."""

    knots: np.ndarray  # K A P, complex, FADING_SECONDS apart
    clutter_phases: np.ndarray  # A

    @staticmethod
    def draw(rng: np.random.Generator, num_seconds: float) -> "Fading":
        """Draws the gains of a recording of that length."""
        size = (make_demo.NUM_ANTENNAS, NUM_SCATTERERS)
        steady = np.exp(2j * np.pi * rng.random(size))
        phases = np.exp(2j * np.pi * rng.random(make_demo.NUM_ANTENNAS))
        drawn = rng.standard_normal((int(num_seconds / FADING_SECONDS) + 3, 2, *size))
        return Fading(steady + make_demo.FADING * (drawn[:, 0] + 1j * drawn[:, 1]), phases)

    def sum_echoes(self, phasors: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Sums phasors [P T] at these moments [T] for each antenna; returns [A T]."""
        at = seconds / FADING_SECONDS
        first, last = int(at[0]), int(at[-1]) + 2
        signal = np.zeros((make_demo.NUM_ANTENNAS, len(seconds)), dtype=complex)
        for knot in range(first, last + 1):
            weights = np.clip(1 - np.abs(at - knot), 0, 1)
            here = slice(*np.searchsorted(at, [knot - 1, knot + 1]))
            signal[:, here] += (self.knots[knot] @ phasors[:, here]) * weights[here]
        return signal


def clutter(how: Circumstances, seconds: np.ndarray, change_db: np.ndarray) -> np.ndarray:
    """Returns the echoes [T] of the room: walls that stand still, and a fan whose blades come and go."""
    swing = 4 * np.pi / make_demo.WAVELENGTH_M * 0.02 * np.sin(2 * np.pi * how.fan_hertz * seconds)
    return ratio(how.clutter_db + change_db) + ratio(how.fan_db) * np.exp(1j * swing)


# --- windows -----------------------------------------------------------------------------------------------


def columns_of(num_windows: int) -> int:
    """Returns how many columns of the radar's spectrogram so many windows take."""
    hop = round(make_demo.IMAGE_SIZE * (1 - OVERLAP))
    return make_demo.IMAGE_SIZE + hop * (num_windows - 1)


def windows(seed: int, number: int, recording: int, *, num_windows: int, image_size: int) -> Iterator[np.ndarray]:
    """Yields the windows of a recording in order, uint8 [S S 3]; the last three quarters of one begin the next."""
    level = recording_db(seed, number, recording, columns_of(num_windows))
    block = make_demo.IMAGE_SIZE // image_size
    power = (10 ** (level / 10)).reshape(image_size, block, -1, block).mean(axis=(1, 3))  # S C
    pixels = make_demo.jet(np.clip(1 + 10 * np.log10(power) / make_demo.DB_RANGE, 0, 1))
    hop = round(image_size * (1 - OVERLAP))
    for first in range(0, hop * num_windows, hop):
        yield pixels[:, first : first + image_size]


def window_path(folder: Path, recording: int, number: int, window: int) -> Path:
    """Returns where a window lies; recordings, walkers and windows count from 1."""
    name = f"ID_{number}"
    return folder / f"recording_{recording}" / name / f"{name}_recording_{recording}_{window:04d}.jpg"


def write_recordings(
    folder: Path, *, people: int, recordings: int, num_windows: int, image_size: int, seed: int
) -> int:
    """Writes the windows of all recordings of walkers 1 to `people`; returns how many bytes they are."""
    num_bytes = 0
    for recording in range(1, recordings + 1):
        for number in range(1, people + 1):
            window_path(folder, recording, number, 1).parent.mkdir(parents=True, exist_ok=True)
            found = windows(seed, number, recording, num_windows=num_windows, image_size=image_size)
            for window, pixels in enumerate(found, start=1):
                path = window_path(folder, recording, number, window)
                Image.fromarray(pixels).save(path, **make_demo.JPEG)
                num_bytes += path.stat().st_size
    return num_bytes


def main(argv: list[str] | None = None) -> int:
    """Makes the recordings that the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Simulate recordings of walkers, cut into windows.", allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for recording_1, recording_2, ...")
    parser.add_argument("--people", type=int, default=NUM_WALKERS, help=f"how many walkers (default {NUM_WALKERS})")
    parser.add_argument(
        "--recordings", type=int, default=NUM_RECORDINGS, help=f"of each walker (default {NUM_RECORDINGS})"
    )
    parser.add_argument(
        "--windows", type=int, default=NUM_WINDOWS, help=f"of each recording, 0.56 s apart (default {NUM_WINDOWS})"
    )
    parser.add_argument("--image_size", type=int, choices=IMAGE_SIZES, default=64, help="in pixels (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is other people in other rooms")
    args = parser.parse_args(argv)
    for name, low in (("people", 1), ("recordings", 1), ("windows", 1), ("seed", 0)):
        if getattr(args, name) < low:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least {low}")
    if args.people >= SEEDS_APART:
        parser.error(f"--people is {args.people}; it must be below {SEEDS_APART}")
    try:
        num_bytes = write_recordings(
            args.output,
            people=args.people,
            recordings=args.recordings,
            num_windows=args.windows,
            image_size=args.image_size,
            seed=args.seed,
        )
    except OSError as error:
        parser.error(f"--output {args.output} cannot be written: {error.strerror or error}")
    counts = f"{args.people} walkers x {args.recordings} recordings x {args.windows} windows"
    print(f"{counts}, {num_bytes / 1e6:.2f} MB, in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
