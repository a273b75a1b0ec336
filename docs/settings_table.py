"""Prints the settings of the scripts as Markdown tables, or writes them into the pages about settings.

    python docs/settings_table.py                   # English
    python docs/settings_table.py --language zh     # Chinese
    python docs/settings_table.py --write           # replaces the tables in docs/settings.md and docs/zh-CN/settings.md

Names, defaults and limits come from the module of settings. The Chinese help stands here under the English one that it
translates, so that a help text that was changed asks for its translation.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # started as a script, it finds only what lies in docs/
    sys.path.insert(0, str(ROOT))

from gait_latents import settings
from gait_latents.common import cli, errors
from gait_latents.common.cli import Spec

PAGES = {"en": ROOT / "docs" / "settings.md", "zh": ROOT / "docs" / "zh-CN" / "settings.md"}
BEGIN, END = "<!-- settings: begin (python docs/settings_table.py --write) -->", "<!-- settings: end -->"

_HEADS = {"en": ("setting", "default", "takes", "what it does"), "zh": ("设置", "默认值", "取值", "作用")}
_KINDS = {
    "en": {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"},
    "zh": {int: "整数", float: "数", bool: "`true`, `false`", str: "文本"},
}
_PATHS = {"en": "path", "zh": "路径"}
_SEVERAL = {"en": "one or more: {}", "zh": "一个或多个：{}"}
_BY_NAME = {"en": "whole number, or words `NAME=NUMBER`", "zh": "整数，或若干个 `名称=数`"}
_PAIRS = {"en": "two numbers", "zh": "两个数"}
_OR = {"en": " or ", "zh": "或 "}
_FREE_NOTES = {"en": "\\* may change when a run goes on.", "zh": "\\* 续训时可以更改。"}
_NOTHING = {"en": "(none)", "zh": "（空）"}

GROUPS_ZH = {
    settings.DATA: "图像",
    settings.CACHE: "缓存与 VAE",
    settings.NETWORK: "网络",
    settings.DIFFUSION: "扩散",
    settings.TRAINING: "训练",
    settings.SAVING: "保存与日志",
    settings.SAMPLING: "采样",
    settings.OUTPUT: "生成的图像",
    settings.EVALUATION: "评估",
    settings.MACHINE: "机器",
}

HELP_ZH = {
    "seed of the split and of every random draw": "划分训练/测试集以及一切随机抽样所用的种子",
    "auto, cpu, cuda or cuda:N": "`auto`、`cpu`、`cuda` 或 `cuda:N`",
    "open a VAE or weights in a pickle (.pt, .pth, .ckpt, .bin) with torch below 2.10, which has a hole there": (
        "即使 torch 低于 2.10（读取 pickle 时有漏洞），也打开 pickle 形式的 VAE 或权重（.pt、.pth、.ckpt、.bin）"
    ),
    "KL-VAE: a .pt, .pth or .safetensors file, a diffusers folder, or a hub id": (
        "KL-VAE：.pt、.pth 或 .safetensors 文件，diffusers 文件夹，或 Hugging Face hub 上的名称"
    ),
    "folder with one sub-folder of images per class": "数据文件夹，其中每个类别一个子文件夹",
    "scale of the VAE's own normalisation, (z - shift) times scale; none takes that of its file, or the usual one": (
        "VAE 自带归一化的缩放，即（z 减平移）乘以缩放；none 表示取 VAE 文件中给出的值，没有则取常用值"
    ),
    "shift of the VAE's own normalisation; none takes that of its file, or the usual one": (
        "VAE 自带归一化的平移；none 表示取 VAE 文件中给出的值，没有则取常用值"
    ),
    "side of the square images, in pixels": "正方形图像的边长（像素）",
    "how an image becomes a square: crop cuts the centre out, squash keeps all but the aspect, pad adds black bars": (
        "如何把图像变成正方形：crop 截取中央，squash 保留全部内容但改变宽高比，pad 用黑边补齐"
    ),
    "number of classes, in natural order": "类别数，按自然顺序取前几个",
    "which classes, by name or by a pattern such as ID_*, or all; num_users takes the first of them": (
        "使用哪些类别：类别名或通配模式（如 ID_*），或 all（全部）；num_users 再取其中前几个"
    ),
    "training images per class": "每个类别的训练图像数",
    "what to do where a class has fewer images than images_per_user: refuse, or take all that it has": (
        "某个类别的图像少于 images_per_user 时：refuse 报错，take 取其全部图像"
    ),
    "how training images are chosen in a class; contiguous suits overlapping windows of one recording": (
        "类内如何选取训练图像；contiguous（连续）适合同一段录制的重叠窗口"
    ),
    "images left out between training, validation and test of a contiguous split": (
        "连续划分时训练、验证与测试之间空出的图像数"
    ),
    "where in each class a contiguous split begins, as a share of its images: another start is another split": (
        "contiguous 划分从每个类别的哪里开始，以该类别图像数的比例表示：换一个起点就是另一种划分"
    ),
    "images per class on which a run is measured while it trains, at most a quarter of those not for training": (
        "每个类别用来在训练中衡量模型的图像数，最多占非训练图像的四分之一"
    ),
    "go on without images that cannot be read, and record them": "跳过无法读取的图像继续运行，并记录在案",
    "images of 256x256 per encoder call on a GPU, of larger ones fewer; on a CPU, where it is faster, always one": (
        "GPU 上编码器每次处理的 256x256 图像数，更大的图像更少；CPU 上总是一次一张，这样更快"
    ),
    "number format of the encoder; what is stored is float16 moments in any case": (
        "编码器的数值格式；无论选哪种，存盘的都是 float16 的 moments（均值与对数方差）"
    ),
    "the cache folder": "缓存文件夹",
    "which images to encode": "编码哪些图像",
    "list what nobody needs in a cache instead of filling it; with --yes, remove it": (
        "不填充缓存，只列出其中无人需要的内容；加 `--yes` 则删除"
    ),
    "do what --prune lists": "执行 `--prune` 所列的删除",
    "run folders whose latents --prune keeps, besides those of the cache's own split": (
        "`--prune` 除缓存自身的划分外还为其保留潜变量的训练结果文件夹"
    ),
    "check a cache instead of filling it: every seal, and a few images decoded": (
        "不编码，只检查缓存：核对每一行的校验和，并解码几张图像"
    ),
    "guidance scale s in uncond + s * (cond - uncond); 1 is off": (
        "引导强度 s，公式为 uncond + s * (cond - uncond)；1 表示关闭"
    ),
    "part of the way from noise (0) to image (1) on which guidance acts; elsewhere a step takes one pass, not two": (
        "引导起作用的区段，以从噪声（0）到图像（1）的路程表示；区段之外每步只算一次网络，而不是两次"
    ),
    "solver: dpm++ is DPM-Solver++(2M)": "求解器；dpm++ 即 DPM-Solver++(2M)",
    "solver steps; auto is 12 for dpm++ (20 in runs that began with that), 250 for ddim, every step for ddpm": (
        "求解步数；auto 时 dpm++ 为 12（以 20 开始的训练仍为 20），ddim 为 250，ddpm 为全部步数"
    ),
    "compile the network: auto does so in runs long enough to repay it, where a compiler is at hand": (
        "编译网络：auto 在训练足够长、值得编译且有编译器时编译"
    ),
    "number format of the network: auto is bfloat16 or float16 on a GPU, whichever is native, float32 on a CPU": (
        "网络的数值格式；auto 在 GPU 上取其原生支持的 bfloat16 或 float16，在 CPU 上取 float32"
    ),
    "where checkpoints, grids and logs go": "存放检查点、样本网格图和日志的文件夹",
    "run folder or checkpoint file to go on from, when results_folder is empty; may be read-only": (
        "results_folder 为空时，从这个训练文件夹或检查点文件继续；可以是只读的"
    ),
    "run folder or checkpoint file whose weights a new run begins with; its classes may be others (freeze_network)": (
        "新的训练从这个训练文件夹或检查点文件的权重开始；两者的类别可以不同（参见 freeze_network）"
    ),
    "moments: per-channel shift and scale measured on training images; scale_factor: the VAE's own constant": (
        "moments：在训练图像上逐通道测得的平移与缩放；scale_factor：VAE 自带的常数"
    ),
    "training images that the measured normalisation looks at": "测量归一化时使用的训练图像数",
    "width of the U-Net's first level, in channels": "U-Net 第一级的通道数",
    "width of each level, as multiples of dim": "各级通道数，以 dim 的倍数表示",
    "channels per attention head": "每个注意力头的通道数",
    "attention heads": "注意力头数",
    "probability that a training latent loses its class, for guidance": (
        "训练时以此概率丢弃潜变量的类别条件，供引导使用"
    ),
    "diffusion timesteps": "扩散的时间步数",
    "what the network predicts": "网络预测的量",
    "noise schedule": "噪声日程",
    "how much noisier each timestep is than in the schedule: added to log(sigma / alpha)": (
        "每个时间步比噪声日程多多少噪声：加到 log(sigma / alpha) 上"
    ),
    "weigh the loss by min-SNR": "用 min-SNR 给损失加权",
    "gamma of min-SNR": "min-SNR 的 gamma",
    "latents per forward pass": "每次前向传播的潜变量数",
    "forward passes per step; a step sees train_batch_size times this": (
        "每个训练步包含的前向传播次数；每步共用 train_batch_size 乘以此数个潜变量"
    ),
    "with init_from: train the embeddings of classes alone, and keep all else; train_lr is then 0.03, and auto "
    "25 passes and 400 steps at least": (
        "与 init_from 合用：只训练类别嵌入，其余权重保持不变；此时 train_lr 为 0.03，auto 为 25 遍且不少于 400 步"
    ),
    "learning rate of Adam": "Adam 的学习率",
    "latents are moved along the width, time in a spectrogram, by up to this share of it, each time they are seen": (
        "每次看到潜变量时，沿宽度方向（谱图中为时间）随机移动，最多移动宽度的这一比例"
    ),
    "count columns that time_shift fills with the edge in the loss, as older runs do: samples get such edges": (
        "损失中也计入 time_shift 用边缘列填充的列，与旧版本的训练相同；生成的图像会因此带有这样的边缘"
    ),
    "steps in all; auto is as many as see each training image 150 times, and at least fewest_steps": (
        "总步数；auto 使每张训练图像被看到 150 次，且不少于 fewest_steps"
    ),
    "steps that train_num_steps auto takes at least: few images need as many as some hundred do": (
        "train_num_steps 为 auto 时至少训练的步数：图像很少时也需要与几百张图像一样多的步数"
    ),
    "compute the forward passes of a step as one where they are small: the same training, and faster": (
        "一步中的各次前向传播若规模不大，则合为一次计算：训练相同，但更快"
    ),
    "gradients are clipped to this norm": "梯度裁剪的范数上限",
    "decay of the averaged weights": "平均权重（EMA）的衰减率",
    "steps between updates of the average": "每隔多少步更新一次平均权重",
    "save and stop before this many hours after the start of the process": (
        "从进程启动算起，在达到这么多小时之前保存并停止"
    ),
    "steps between checkpoints and grids": "每隔多少步保存检查点并生成样本网格图",
    "columns of the sample grid; 0 makes no grid": "样本网格图的列数；0 表示不生成",
    "steps between lines of metrics.jsonl": "每隔多少步在 metrics.jsonl 中写一行",
    "bit-exact resume on a GPU, at some cost in speed": "在 GPU 上续训时逐位一致，速度略有损失",
    "where figures and grids go, too: auto is tensorboard where it is installed; wandb sends them to its server": (
        "数据与网格图另外送往何处：auto 在装有 TensorBoard 时用它；wandb 会发送到其服务器"
    ),
    "project in Weights & Biases": "Weights & Biases 中的项目名",
    "name of the run in Weights & Biases; none is that of results_folder": (
        "Weights & Biases 中的运行名；none 表示取 results_folder 的名字"
    ),
    "run folder, or one checkpoint file in it": "训练文件夹，或其中的一个检查点文件",
    "class names, or patterns such as ID_*, or all": "类别名或通配模式（如 ID_*），或 all",
    "images per class; ID_3=100 ID_4=20 50 is 100 of ID_3, 20 of ID_4 and 50 of each other class": (
        "每个类别生成的图像数；ID_3=100 ID_4=20 50 表示 ID_3 生成 100 张，ID_4 生成 20 张，其余类别各 50 张"
    ),
    "as many images of each class as make this number together with its training images": (
        "每个类别生成的图像数，使其与该类别的训练图像合计达到这个数"
    ),
    "begin with training images instead of noise: 0 gives them back as the VAE draws them, 1 keeps next to nothing": (
        "不从噪声开始，而从训练图像开始：0 得到 VAE 采样的原图，1 几乎什么都不保留"
    ),
    "the VAE that decodes; none takes the run's own": "用于解码的 VAE；none 表示用训练时的那个",
    "where the images go": "存放生成图像的文件夹",
    "auto is the format of the training images": "auto 表示与训练图像的格式相同",
    "levels of noise listed for a DDIM loop; at most as many as the model has timesteps": (
        "为 DDIM 循环列出的噪声级数；最多与模型的时间步数相同"
    ),
    "where the exported model, or the shards, go": "存放导出的模型或分片的文件夹",
    "export the training latents of a cache in place of a model; webdataset writes tar shards for many nodes": (
        "导出缓存中用于训练的潜变量，而不是模型；webdataset 写出供多个节点使用的 tar 分片"
    ),
    "the cache whose latents are exported": "要导出其潜变量的缓存",
    "latents in a shard; each process needs shards of its own": "每个分片中的潜变量数；每个进程都需要自己的分片",
    "make only a picture of classes x these guidance scales": "只画一张图：各类别 × 这些引导强度",
    "folder with one sub-folder of generated images per class": "生成图像的文件夹，其中每个类别一个子文件夹",
    "where the report goes": "存放报告的文件夹",
    "the real images; none takes the run's own folder": "真实图像的文件夹；none 表示用训练时的那个",
    "the VAE that encodes; none takes the run's own": "用于编码的 VAE；none 表示用训练时的那个",
    "k of precision, recall, density and coverage": "precision、recall、density、coverage 所用的 k",
    "weights for FID with Inception features: a file, or download; none leaves FID out": (
        "用 Inception 特征计算 FID 所需的权重：文件，或 download（下载）；none 表示不计算 FID"
    ),
    "train classifiers with and without the generated images, and test them: auto does so on a GPU": (
        "分别在有和没有生成图像的情况下训练分类器并测试；auto 只在 GPU 上这样做"
    ),
    "training steps of each classifier": "每个分类器的训练步数",
    "classifiers of each kind, to see the spread": "每种分类器训练几个，以看出离散程度",
    "side of the images that the classifiers see, in pixels": "分类器所见图像的边长（像素）",
    "sample at these guidance scales instead of looking at images, and compare": (
        "不看图像，而是在这些引导强度下采样并比较"
    ),
    "print the classifiers of these evaluation folders in one table, instead of evaluating": (
        "把这些评估文件夹里的分类器合并成一张表打印出来，而不进行评估"
    ),
    "checkpoints of the sweep: newest, all, or their steps": "扫描哪些检查点：newest（最新）、all（全部），或其步数",
    "samples per class at each point of the sweep": "扫描的每一点上每个类别的样本数",
}


def help_texts() -> set[str]:
    """Returns every English help text that a table shows."""
    return {spec.help for cls in settings.SCRIPTS.values() for spec in cli.specs(cls).values()}


def title(script: str) -> str:
    """Returns the heading above the table of a script."""
    return f"## `{script}`"


def tables(language: str) -> str:
    """Returns one Markdown table per script, each under its heading, in "en" or "zh"."""
    parts = ["\n".join([title(script), "", *_table(cls, language)]) for script, cls in settings.SCRIPTS.items()]
    return "\n\n".join(parts)


def _table(cls: type, language: str) -> list[str]:
    rows = [_HEADS[language], ("---",) * 4, *_rows(cls, language)]
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return [*lines, "", _FREE_NOTES[language]] if cli.can_resume(cls) else lines


def _rows(cls: type, language: str) -> Iterator[tuple[str, ...]]:
    specs, standard = cli.specs(cls), cli.defaults(cls)
    for group, members in groupby(cli.by_group(cls), key=lambda name: specs[name].group):
        yield f"**{GROUPS_ZH[group] if language == 'zh' else group}**", "", "", ""
        for name in members:
            spec, mark = specs[name], " \\*" if specs[name].free and cli.can_resume(cls) else ""
            shown = f"`{cli.show(standard[name])}`" if standard[name] != () else _NOTHING[language]
            help_text = HELP_ZH[spec.help] if language == "zh" else spec.help
            yield f"`{name}`{mark}", shown, _takes(spec, language), help_text.replace("*", "\\*").replace("|", "\\|")


def _takes(spec: Spec, language: str) -> str:
    if spec.choices:
        listed = ", ".join(f"`{choice}`" for choice in spec.choices)
        return _SEVERAL[language].format(listed) if spec.many else listed
    if spec.by_name:
        return _BY_NAME[language]
    if spec.pair:
        return _PAIRS[language]
    kind = _PATHS[language] if spec.path else _KINDS[language][spec.kind]
    texts = [_SEVERAL[language].format(kind) if spec.many else kind, *(f"`{word}`" for word in spec.words)]
    return _OR[language].join(texts)


def with_tables(text: str, language: str) -> str:
    """Returns the text of a page with the tables between its markers made anew."""
    before, found_begin, rest = text.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found_begin and found_end):
        raise errors.UserError(f"the page has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{tables(language)}\n\n{END}{after}"


def main(argv: Sequence[str] | None) -> int:
    """Prints the tables, or writes them into the pages of both languages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", choices=sorted(PAGES), default="en", help="language of what is printed")
    parser.add_argument("--write", action="store_true", help="write the pages of both languages instead of printing")
    arguments = parser.parse_args(argv)
    if not arguments.write:
        print(tables(arguments.language))
        return 0
    for language, path in PAGES.items():
        path.write_text(with_tables(path.read_text(encoding="utf-8"), language), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(None))
