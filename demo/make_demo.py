"""Simulates the micro-Doppler gait images of the demo: walking people seen by a 24 GHz radar.

A walker is a set of point scatterers on torso, head, arms and legs, moved by the joint angles of normal gait. Their
echoes are summed as complex phasors, once per antenna; the short-time Fourier transform of each antenna is averaged
in power, shown in dB and coloured. A picture is a function of (person, seed, walk): the same command makes the same
pixels again.

    python demo/make_demo.py                                            # the 6 walkers of demo/walkers
    python demo/make_demo.py --output /tmp/fresh --seed 1               # fresh walks of the same 6 people
    python demo/make_demo.py --output /tmp/many --first_person 7 --people 400 --walks 10

Shapes: T radar pulses, P scatterers, A antennas, S image size.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SIZE = 128
NUM_ANTENNAS = 16
NUM_FADING_KNOTS = 6
FADING = 0.35
START_JITTER = 0.03  # strides, standard deviation: a picture starts about when a heel strikes
NOISE_DB = (-20.0, -16.0)  # per pulse, relative to one torso scatterer
WAVELENGTH_M = 0.0125
PULSES_PER_SECOND = 2048
STFT_WINDOW = 144  # pulses
STFT_LENGTH = 224  # the window padded with zeros; one row is 0.057 m/s
STFT_HOP = 36
LOWEST_ROW = -24  # the picture shows -1.4 m/s to 5.9 m/s, towards the radar upwards
DB_RANGE = 40.0
JPEG = {"quality": 73, "subsampling": 0, "optimize": True}  # half colours would blur the thin line of the torso

# Joint angles of normal adult gait in degrees, at tenths of the stride from heel strike on.
HIP_DEGREES = (28, 25, 17, 7, -3, -11, -8, 8, 23, 29)
KNEE_DEGREES = (5, 14, 17, 11, 6, 11, 32, 60, 54, 20)
FOOT_DEGREES = (18, 2, 0, 0, -4, -20, -58, -62, -24, 8)  # of the sole against the ground, toe up positive
NUM_HARMONICS = 4


@dataclasses.dataclass(frozen=True)
class Person:
    """Describes how one person is built, walks and reflects."""

    height_m: float
    cadence: float  # strides (two steps) per second
    stride: float  # length of one stride in body heights
    arm_swing: float  # degrees to either side
    elbow: float  # mean flexion in degrees
    knee_lift: float  # factor on the knee flexion
    bounce: float  # relative change of the body's speed within a step
    arms_db: float  # echo of arms and legs relative to an average person
    legs_db: float
    lag: float = 0.0  # of the right leg behind half a stride, in strides: a slight limp

    @property
    def speed(self) -> float:
        """Returns the walking speed in m/s."""
        return self.height_m * self.stride * self.cadence


# ID_1 to ID_6. ID_2 and ID_5 are alike: nearly the same size and speed, a slower pace and a wider arm swing.
WALKERS = (
    Person(1.58, 1.09, 0.70, 24, 25, 0.95, 0.08, 0.0, 1.0),
    Person(1.76, 0.97, 0.80, 18, 20, 1.00, 0.10, -0.5, 0.0),
    Person(1.92, 0.82, 0.93, 34, 30, 1.05, 0.12, 3.0, 0.0),
    Person(1.70, 0.80, 0.68, 8, 15, 0.90, 0.06, -4.0, 1.0, lag=0.03),
    Person(1.80, 0.90, 0.83, 28, 28, 1.00, 0.10, 1.5, -1.0),
    Person(1.82, 1.07, 0.86, 14, 60, 1.06, 0.14, -1.0, 2.5),
)


def random_person(number: int) -> Person:
    """Draws the person of that number, who is nobody of WALKERS."""
    rng = np.random.default_rng([number, 7919])
    height_m = rng.uniform(1.52, 1.96)
    return Person(
        height_m=height_m,
        cadence=rng.uniform(0.75, 1.08) * (1.76 / height_m) ** 0.5,
        stride=rng.uniform(0.66, 0.90),
        arm_swing=rng.uniform(5, 38),
        elbow=rng.uniform(10, 65),
        knee_lift=rng.uniform(0.88, 1.12),
        bounce=rng.uniform(0.05, 0.15),
        arms_db=rng.uniform(-5, 4),
        legs_db=rng.uniform(-2, 3),
        lag=rng.uniform(0, 0.04),
    )


def person(number: int) -> Person:
    """Returns the person of class ID_<number>: one of WALKERS for 1 to 6, a drawn one above."""
    return WALKERS[number - 1] if number <= len(WALKERS) else random_person(number)


def joint_curve(degrees: tuple[int, ...], phase: np.ndarray) -> np.ndarray:
    """Evaluates a joint angle in radians at a phase in strides, by the first harmonics of its table."""
    spectrum = np.fft.rfft(np.deg2rad(degrees)) / len(degrees)
    harmonics = np.arange(1, NUM_HARMONICS + 1)[:, None]
    waves = spectrum[1 : NUM_HARMONICS + 1, None] * np.exp(2j * np.pi * harmonics * phase)
    return spectrum[0].real + 2 * waves.real.sum(axis=0)


def along(start: np.ndarray, end: np.ndarray, count: int) -> list[np.ndarray]:
    """Returns `count` points spread evenly inside a limb."""
    return [start + (end - start) * (i + 0.5) / count for i in range(count)]


def offset(length_m: float, angle: np.ndarray) -> np.ndarray:
    """Returns where a segment hanging from the origin ends [3 T]: `angle` is forward from straight down."""
    return length_m * np.stack([np.sin(angle), np.zeros_like(angle), -np.cos(angle)])


def leg_points(who: Person, hip: np.ndarray, phase: np.ndarray) -> tuple[list[np.ndarray], list[float]]:
    """Places the scatterers of one leg; returns positions [3 T] and their echoes in dB."""
    height_m = who.height_m
    # A longer stride takes a wider swing: the foot must stand still while it carries the body.
    thigh = joint_curve(HIP_DEGREES, phase) * (who.stride / 0.80)
    shank = thigh - joint_curve(KNEE_DEGREES, phase) * who.knee_lift
    knee = hip + offset(0.245 * height_m, thigh)
    ankle = knee + offset(0.246 * height_m, shank)
    toe = ankle + offset(0.11 * height_m, np.pi / 2 + joint_curve(FOOT_DEGREES, phase))
    points = along(hip, knee, 6) + along(knee, ankle, 12) + along(ankle, toe, 4)
    return points, [level + who.legs_db for level in 6 * [-15.0] + 12 * [-19.0] + 4 * [-20.0]]


def arm_points(who: Person, shoulder: np.ndarray, swing: np.ndarray) -> tuple[list[np.ndarray], list[float]]:
    """Places the scatterers of one arm for a swing in [-1, 1]; returns positions [3 T] and echoes in dB."""
    upper = np.deg2rad(who.arm_swing * swing + 4)
    fore = upper + np.deg2rad(who.elbow * (1 + 0.4 * swing))
    elbow = shoulder + offset(0.186 * who.height_m, upper)
    hand = elbow + offset(0.20 * who.height_m, fore)
    points = along(shoulder, elbow, 4) + along(elbow, hand, 7)
    return points, [level + who.arms_db for level in 4 * [-17.0] + 7 * [-20.0]]


def body_points(who: Person, phase: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places all scatterers of a walk along x; returns positions [P 3 T] in m and echoes [P] in dB."""
    height_m, turn = who.height_m, np.deg2rad(7) * np.cos(2 * np.pi * phase)
    sway = who.speed * who.bounce * np.sin(4 * np.pi * phase) / (4 * np.pi * who.cadence)
    rise = 0.012 * height_m * -np.cos(4 * np.pi * phase)
    pelvis = np.stack([who.speed * seconds + sway, np.zeros_like(phase), 0.53 * height_m + rise])
    chest = pelvis + offset(-0.25 * height_m, np.full_like(phase, -0.04))
    points = [*along(pelvis, chest, 4), chest + offset(-0.15 * height_m, np.zeros_like(phase))]
    levels = [0.0, 0.0, 0.0, 0.0, -7.0]
    for side in (1, -1):
        leg_phase = phase if side == 1 else phase + 0.5 - who.lag
        across = np.stack([np.sin(side * turn), side * np.cos(turn), np.zeros_like(phase)])
        legs = leg_points(who, pelvis + 0.05 * height_m * across, leg_phase)
        counter = across * np.array([-1, 1, 1])[:, None]  # shoulders turn against the pelvis
        arms = arm_points(who, chest + 0.12 * height_m * counter, -np.cos(2 * np.pi * leg_phase))
        points += legs[0] + arms[0]
        levels += legs[1] + arms[1]
    return np.stack(points), np.array(levels)


def drift(num_pulses: int) -> np.ndarray:
    """Returns the weights [K T] that interpolate linearly between K moments of a walk."""
    at = np.linspace(0, NUM_FADING_KNOTS - 1, num_pulses)
    return np.clip(1 - np.abs(at - np.arange(NUM_FADING_KNOTS)[:, None]), 0, 1)


def echoes(points: np.ndarray, levels_db: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sums the phasors of all scatterers [P 3 T] for each antenna; returns [A T], noise included."""
    num_points, _, num_pulses = points.shape
    radar = np.array([rng.uniform(8.0, 9.0), rng.uniform(-0.3, 0.3), 1.0])
    distance_m = np.linalg.norm(radar[:, None] - points, axis=1)  # P T
    phasors = np.exp(-4j * np.pi / WAVELENGTH_M * distance_m) * 10 ** (levels_db[:, None] / 20)
    # Each antenna sees another aspect: its own phases, and gains that fade as the aspect drifts.
    steady = np.exp(2j * np.pi * rng.random((NUM_ANTENNAS, num_points)))
    fading = rng.standard_normal((2, NUM_FADING_KNOTS, NUM_ANTENNAS, num_points))
    gains = steady + FADING * (fading[0] + 1j * fading[1])  # K A P
    signal = ((gains @ phasors) * drift(num_pulses)[:, None]).sum(axis=0)  # A T
    noise = rng.standard_normal((2, *signal.shape)) * 10 ** (rng.uniform(*NOISE_DB) / 20)
    return signal + noise[0] + 1j * noise[1]


def spectrogram_db(signal: np.ndarray) -> np.ndarray:
    """Averages the antennas' short-time Fourier transforms in power; returns dB [S S], high speed on top."""
    frames = np.lib.stride_tricks.sliding_window_view(signal, STFT_WINDOW, axis=1)[:, ::STFT_HOP]
    spectra = np.fft.fft(frames * np.hanning(STFT_WINDOW), n=STFT_LENGTH, axis=2)  # A S length
    rows = np.arange(LOWEST_ROW, LOWEST_ROW + IMAGE_SIZE)
    power = (np.abs(spectra[:, :, rows]) ** 2).mean(axis=0)
    return 10 * np.log10(power).T[::-1]


def jet(level: np.ndarray) -> np.ndarray:
    """Colours levels in [0, 1] from dark blue to dark red; returns uint8 [... 3]."""
    centres = np.array([3.0, 2.0, 1.0])
    rgb = np.clip(1.5 - np.abs(4 * level[..., None] - centres), 0, 1)
    return np.round(255 * rgb).astype(np.uint8)


def walk_image(number: int, seed: int, walk: int) -> np.ndarray:
    """Simulates one walk of the person of that number; returns the picture, uint8 [S S 3]."""
    rng = np.random.default_rng([seed, number, walk])
    who = person(number)
    who = dataclasses.replace(
        who,
        cadence=who.cadence * rng.normal(1, 0.010),
        stride=who.stride * rng.normal(1, 0.010),
        arm_swing=who.arm_swing * rng.normal(1, 0.08),
    )
    num_pulses = STFT_WINDOW + STFT_HOP * (IMAGE_SIZE - 1)
    seconds = np.arange(num_pulses) / PULSES_PER_SECOND
    start = 0.5 * rng.integers(2) + rng.normal(0, START_JITTER)
    points, levels_db = body_points(who, start + who.cadence * seconds, seconds)
    level = spectrogram_db(echoes(points, levels_db, rng))
    top = np.percentile(level, 99.5)
    return jet(np.clip(1 + (level - top) / DB_RANGE, 0, 1))


def write_walks(folder: Path, numbers: range, walks: int, seed: int) -> int:
    """Writes `walks` JPGs per person as folder/ID_n/ID_n_www.jpg; returns their bytes."""
    num_bytes = 0
    for number in numbers:
        class_folder = folder / f"ID_{number}"
        class_folder.mkdir(parents=True, exist_ok=True)
        for walk in range(walks):
            path = class_folder / f"ID_{number}_{walk:03d}.jpg"
            Image.fromarray(walk_image(number, seed, walk)).save(path, **JPEG)
            num_bytes += path.stat().st_size
    return num_bytes


def main(argv: list[str] | None = None) -> int:
    """Makes the images that the command line asks for; returns the exit code."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Simulate micro-Doppler gait images.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=here / "walkers", help="folder for ID_1, ID_2, ...")
    parser.add_argument("--people", type=int, default=len(WALKERS), help="how many people (default 6)")
    parser.add_argument("--first_person", type=int, default=1, help="number of the first; above 6 are random")
    parser.add_argument("--walks", type=int, default=40, help="images per person (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another set of walks")
    args = parser.parse_args(argv)
    for name in ("people", "first_person", "walks"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    numbers = range(args.first_person, args.first_person + args.people)
    try:
        num_bytes = write_walks(args.output, numbers, args.walks, args.seed)
    except OSError as error:
        parser.error(f"--output {args.output} cannot be written: {error.strerror or error}")
    print(f"{args.people} walkers x {args.walks} images, {num_bytes / 1e6:.2f} MB, in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
