"""The data of a run: its split, its space of the cache, and the dataset over its training images."""

from dataclasses import dataclass

import torch

from gait_latents.common import console, files
from gait_latents.common.console import say, show_name, warn
from gait_latents.common.distributed import ALONE, Ranks
from gait_latents.common.errors import Failed, Stopped, UserError
from gait_latents.common.layout import SPLIT_NAME
from gait_latents.common.process import StopSignals
from gait_latents.images import changes, data_report, reading, selection, windows
from gait_latents.images.reading import BadImage
from gait_latents.images.split import Split, read_split
from gait_latents.latents import cache as latent_cache
from gait_latents.latents import filling, opening, vae_fit
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.dataset import LatentDataset
from gait_latents.latents.vae_fit import ChosenSpace
from gait_latents.settings import TrainSettings
from gait_latents.training.beginning import warn_of_seen_tests
from gait_latents.training.plan import TrainingPlan, plain_errors
from gait_latents.training.run_meta import RunMeta


@dataclass(frozen=True)
class Data:
    """What a run trains on: its split, the space of its latents, and the datasets over its images.

    Attributes:
        dataset: over the training images.
        validation: over the images on which training is measured; None where the split has none.
    """

    split: Split
    chosen: ChosenSpace
    dataset: LatentDataset
    validation: LatentDataset | None = None


def open_data(plan: TrainingPlan, device: torch.device, ranks: Ranks = ALONE) -> Data:
    """Opens the dataset of the run, which encodes what is missing when it is first needed.

    Raises:
        UserError: when something that is needed is not at hand, or differs from what the run was started with.
        Failed: when images cannot be read, after each was named.
    """
    with ranks.together(), plain_errors(plan):
        data = _open(plan, device, ranks)
    ranks.check_same(_facts(data, device), "give all the same images, VAE and packages, and one kind of device")
    return data


def _facts(data: Data, device: torch.device) -> dict[str, object]:
    """Returns what must be the same on all processes of a run."""
    return {
        "latents of the space": data.chosen.space.id,
        "images and labels of the digest": data.dataset.digest()[:16],
        "a device of the kind": device.type,
        "torch": torch.__version__,
    }


def _open(plan: TrainingPlan, device: torch.device, ranks: Ranks) -> Data:
    settings, folder = plan.settings, plan.cache_folder
    goes_on = plan.state is not None  # its split and space are known, so that images and VAE may be missing
    known = _known_space(plan)
    at_hand = selection.images_at_hand(settings, plan.sources, may_lack=goes_on)
    split = _run_split(plan, at_hand)
    chosen = vae_fit.choose_space(settings, plan.sources, known, may_lack=goes_on)
    data_report.warn_of_equal_pictures(split)
    if plan.state is None and at_hand:
        windows.warn_of_windows(split, settings.data_path, resize=settings.resize)
    _check_same_space(plan, chosen)
    if plan.beginning is not None:
        warn_of_seen_tests(plan.beginning, split)
    reason = latent_cache.why_not_writable(folder, chosen.space)
    if reason is not None:
        say(f"cannot write to {folder} ({reason}); new latents stay in memory")
    cache = LatentCache(folder, chosen.space, writable=reason is None)
    for problem in cache.problems:
        warn(problem)

    def open_over(split: Split, part: str = "train") -> LatentDataset:
        return opening.open_dataset(
            settings,
            split,
            list(split.part(part)),
            cache=cache,
            vae_at_hand=chosen.vae_at_hand,
            images_at_hand=at_hand,
            device=device,
            on_store_error=_go_on_in_memory,
        )

    dataset = open_over(split)
    if at_hand and chosen.vae_at_hand and plan.state is None:
        mended = _leave_out_bad_images(plan, split, dataset)
        if mended is not split:
            split, dataset = mended, open_over(mended)
    _report_missing(plan, dataset, "before the first step" if ranks.count > 1 else "when first needed")
    if plan.state is not None:
        _check_same_data(plan, plan.state.meta, split, dataset)
    return Data(split, chosen, dataset, open_over(split, "validation") if split.validation else None)


def _run_split(plan: TrainingPlan, at_hand: bool) -> Split:
    """Returns the split of the run that goes on, or draws one for a new run.

    Where the images are at hand, the content keys of the entries are computed from them, so that changes show.
    """
    own = None if plan.origin is None else read_split(plan.origin)
    if own is not None and not at_hand:
        return own
    if own is not None:
        fresh = selection.with_fresh_keys(own, plan.settings.data_path)
        changes.tell_changes_of_run(own, plan.settings.data_path, fresh=fresh)
        return fresh
    stored = read_split(plan.cache_folder)
    in_use = () if plan.state is None else plan.state.meta.classes
    split = selection.choose_images(
        plan.settings, at_hand=at_hand, stored=stored, where=str(plan.cache_folder), in_use=in_use
    )
    if at_hand and stored is not None and plan.manifest is not None:
        changes.tell_changes_of_cache(stored, split, plan.settings.data_path, plan.cache_folder)
    if plan.settings.skip_bad_images and stored is not None:
        split = split.without(stored.skipped)
    return split


def _known_space(plan: TrainingPlan) -> ChosenSpace | None:
    """Returns the space that the run or the cache was made with; it is used where the VAE is not at hand."""
    if plan.state is not None:
        meta = plan.state.meta
        return ChosenSpace(meta.space, meta.scale_factor, meta.shift_factor, vae_at_hand=False)
    return None if plan.manifest is None else vae_fit.space_of_manifest(plan.manifest)


def _leave_out_bad_images(plan: TrainingPlan, split: Split, dataset: LatentDataset) -> Split:
    missing = {dataset.keys[position] for position in dataset.missing()}
    entries = [entry for entry in split.train if entry.key in missing]
    bad = reading.find_bad_images(
        entries,
        data_path=plan.settings.data_path,
        image_size=plan.settings.image_size,
        resize=plan.settings.resize,
    )
    if not bad:
        return split
    for skipped in bad:
        say(f"    {show_name(f'{skipped.class_name}/{skipped.name}')}: {skipped.reason}")
    if not plan.settings.skip_bad_images:
        raise Failed(
            f"{len(bad)} of {len(split.train):,} training images cannot be read; mend or remove them, or give "
            "--skip_bad_images to train without them"
        )
    return split.without(bad)


def _describe_place(dataset: LatentDataset) -> str:
    return "the cache's files" if dataset.place == "shards" else f"memory ({dataset.place})"


def _report_missing(plan: TrainingPlan, dataset: LatentDataset, when: str) -> None:
    missing = dataset.missing()
    say(
        f"{len(dataset):,} images asked, {dataset.num_different - len(missing):,} cached, {len(missing):,} to encode"
        f"{f' {when}' if missing else ''}; latents are read from {_describe_place(dataset)}"
    )
    opening.say_equal(dataset)
    opening.check_can_encode(dataset, plan.settings)


def _check_same_space(plan: TrainingPlan, chosen: ChosenSpace) -> None:
    if plan.state is not None:
        of_run, run = plan.state.meta.space, str(plan.origin)
        vae_fit.check_vae_of_run(chosen.space, of_run, vae_path=plan.settings.vae_path, run=run)
    if plan.beginning is not None:
        of_weights, place = plan.beginning.state.meta.space, plan.beginning.place
        vae_fit.check_vae_of_weights(chosen.space, of_weights, vae_path=plan.settings.vae_path, place=place)


def _check_same_data(plan: TrainingPlan, meta: RunMeta, split: Split, dataset: LatentDataset) -> None:
    if dataset.digest() != meta.data_digest:
        raise UserError(
            f"the images are not those that the run in {plan.origin} was started with: "
            f"{_what_changed(plan, meta, split)}; put them back, or start another run with another --results_folder"
        )
    now = dataset.moments_digest()
    if now is not None and meta.moments_digest not in (None, now):
        say("the same images were encoded again since the last save; the run goes on with the new latents")


def _what_changed(plan: TrainingPlan, meta: RunMeta, split: Split) -> str:
    """Names the training images whose content or class is not what the split of the run says."""
    before = read_split(plan.origin) if plan.origin is not None else None
    if before is None:
        return f"the run had {', '.join(meta.classes)}"
    then = before.keys()
    names = [f"{e.class_name}/{e.name}" for e in split.train if then.get((e.class_name, e.name)) != e.key]
    if not names:
        return f"{SPLIT_NAME} there is of another run"
    return f"{len(names):,} of {len(split.train):,} have another content, the first is {show_name(names[0])}"


def fill(dataset: LatentDataset, ranks: Ranks) -> None:
    """Encodes what is missing before the first step, in which no process may wait for the encoder of another."""
    with StopSignals(after="this image") as signals:
        try:
            bad = filling.fill_together(dataset, ranks, signals)
        finally:
            dataset.cache_flush()
    if bad:
        position, reason = bad[0]
        raise BadImage(f"{dataset.names[position]}: {reason}")


def encode_sample(dataset: LatentDataset, settings: TrainSettings) -> None:
    """Encodes those images, under a progress bar, that the normalisation of a new run is measured on.

    Raises:
        Stopped: after a signal; what was encoded by then is kept.
    """
    positions = dataset.positions_for_norm(seed=settings.seed, num_images=settings.latent_norm_images)
    num_missing = dataset.num_missing(positions)
    if num_missing and dataset.can_encode:
        with (
            StopSignals(after="this image") as signals,
            console.progress(total=num_missing, unit="images", label="encode for the normalisation") as bar,
        ):

            def advance(count: int) -> None:
                bar.advance(count)
                signals.raise_if_received()

            try:
                with dataset.watched(advance):
                    dataset.ensure(positions)
            except BaseException as error:  # a bad image, too, comes after good ones
                dataset.cache_flush()
                if isinstance(error, Stopped):
                    say("stopped; what is encoded is kept, and the same command goes on from there")
                raise


def write_cache_defaults(plan: TrainingPlan, data: Data) -> None:
    """Gives a cache that training alone fills the same manifest and split as preprocessing would."""
    cache = data.dataset.cache
    if plan.manifest is not None or not cache.writable:
        return
    try:
        cache.claim_folder()
        files.publish(plan.cache_folder / SPLIT_NAME, data.split.to_bytes(), below=plan.cache_folder)
        opening.record_manifest(plan.cache_folder, plan.settings, data.chosen, len(data.dataset))
    except OSError as error:
        _go_on_in_memory(error)
        cache.writable = False


def _go_on_in_memory(error: OSError) -> None:
    warn(f"the cache cannot be written to ({error.strerror or error}); new latents stay in memory")
