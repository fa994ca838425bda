"""The command line: each verb reads its arguments, imports what it needs, and calls one function.

Exit codes: 0 success, 2 bad input (one line says what, where and what to do), 75 preempted after a saved checkpoint.
"""

import argparse
import os
import sys
from collections.abc import Callable

from mmscale import __version__
from mmscale.errors import UserError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Answers bad arguments with one line, as every other bad input is answered."""

    def error(self, message: str) -> None:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> None:
    """Runs one verb and leaves the process with its exit code."""
    args = _build_parser().parse_args(argv)
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    try:
        code = args.run(args)
    except UserError as error:
        rank = os.environ.get("RANK")
        where = f" [rank {rank}]" if rank else ""
        print(f"mmscale {args.verb}: error{where}: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mmscale",
        description="Pretrain contrastive-plus-captioning vision-language models on sharded image-text streams.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: mmscale train configs/toy.yaml optim.lr=5e-4",
    )
    parser.add_argument("--version", action="version", version=f"mmscale {__version__}")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher puts it here
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in _VERBS:
        add(verbs)
    return parser


def _verb(verbs, name: str, run: Callable[[argparse.Namespace], int | None], about: str, example: str):
    parser = verbs.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_config_arguments(parser: argparse.ArgumentParser, about: str = "YAML file") -> None:
    parser.add_argument("config", help=about)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings over those of the file")


def _add_toy(verbs) -> None:
    def run(args: argparse.Namespace) -> None:
        from mmscale.data.toy import make_toy

        make_toy(args.out, samples=args.samples, shards=args.shards, seed=args.seed)

    parser = _verb(
        verbs, "toy", run, "draw learnable toy shards", "mmscale toy data/toy --samples 4096 --shards 8 --seed 0"
    )
    parser.add_argument("out", help="folder to write; must be empty or not there")
    parser.add_argument("--samples", type=int, default=4096, help="training pairs (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=8, help="training shards (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def _add_tokenizer(verbs) -> None:
    def run(args: argparse.Namespace) -> None:
        from mmscale.config import DataConfig
        from mmscale.data.samples import iter_captions
        from mmscale.data.tokenizer import train_tokenizer

        data = DataConfig(text_key=args.text_key)
        tokenizer = train_tokenizer(iter_captions(args.shards, data), args.out, args.vocab_size)
        print(f"{args.out}: {tokenizer.vocab_size} pieces")

    parser = _verb(
        verbs,
        "tokenizer",
        run,
        "train a SentencePiece model on the captions of shards",
        "mmscale tokenizer 'data/toy/train-*.tar' data/tokenizer.model --vocab-size 320",
    )
    parser.add_argument("shards", help=_SHARDS)
    parser.add_argument("out", help="the model file to write")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument(
        "--text-key", default="txt", help="where the captions are: txt or json.KEY (default: %(default)s)"
    )


def _add_train(verbs) -> None:
    def run(args: argparse.Namespace) -> int:
        from mmscale.config import load_config

        config = load_config(args.config, args.overrides)  # a mistake in it is told before PyTorch is imported
        from mmscale.train.trainer import train

        return train(config, check=args.check)

    parser = _verb(
        verbs,
        "train",
        run,
        "train; goes on by itself when run.dir holds a checkpoint",
        "deepspeed --num_accelerators 2 --module mmscale train configs/toy.yaml train.samples=8192",
    )
    _add_config_arguments(parser)
    parser.add_argument("--check", action="store_true", help="build everything, run one step, write nothing")


def _add_adapt(verbs) -> None:
    def run(args: argparse.Namespace) -> int:
        from mmscale.adapt.config import AdaptConfig
        from mmscale.config import load_config

        config = load_config(args.config, args.overrides, AdaptConfig)
        from mmscale.adapt.command import adapt

        return adapt(config)

    parser = _verb(
        verbs,
        "adapt",
        run,
        "tune a pretrained model for a task of your own, or make the most of several",
        "mmscale adapt configs/adapt/heads.yaml model.init_from=runs/toy",
    )
    _add_config_arguments(parser, "YAML file; configs/adapt holds one of each kind")


def _add_eval(verbs) -> None:
    def run(args: argparse.Namespace) -> None:
        from mmscale.evaluate.command import evaluate_command

        keys = ("batch", "samples", "classnames", "templates", "distinct_pairs", "all_captions", "vqa_prompt")
        settings = {key: value for key in keys if (value := getattr(args, key))}
        evaluate_command(
            args.model,
            args.data,
            args.task,
            settings=settings,
            output=args.output,
            html=args.html,
            tokenizer=args.tokenizer,
            ema=args.ema,
            device=args.device,
        )

    parser = _verb(
        verbs,
        "eval",
        run,
        "score a run, a checkpoint or an exported folder",
        "mmscale eval runs/toy --task retrieval --data 'data/toy/val-*.tar'",
    )
    _add_model_arguments(parser)
    parser.add_argument("--data", required=True, help=_SHARDS)
    parser.add_argument(
        "--task",
        action="append",
        choices=["zeroshot", "retrieval", "caption", "vqa"],
        help="may be repeated; those of the run's `eval.tasks` when left out",
    )
    parser.add_argument("--batch", type=int, help="samples of a forward pass")
    parser.add_argument("--samples", type=int, help="only the first so many")
    parser.add_argument("--classnames", help="text file, one class name a line (default: from the shards' JSON)")
    parser.add_argument("--templates", help="text file, one prompt template a line, {} for the name")
    parser.add_argument("--distinct-pairs", type=int, help="retrieval among so many pairs that share no caption")
    parser.add_argument("--all-captions", action="store_true", help="retrieval with every caption of a picture")
    parser.add_argument("--vqa-prompt", help="what an answer goes on from, {} for the question")
    parser.add_argument("--output", help="JSON file for the scores")
    parser.add_argument("--html", help="page with the scores, confusions, and pictures of hits and misses")


def _add_caption(verbs) -> None:
    def run(args: argparse.Namespace) -> None:
        from mmscale.evaluate.caption_command import caption_command

        caption_command(
            args.model,
            args.images,
            limit=args.limit,
            output=args.output,
            picture=args.picture,
            beams=args.beams,
            top_p=args.top_p,
            temperature=args.temperature,
            seed=args.seed,
            batch=args.batch,
            tokenizer=args.tokenizer,
            ema=args.ema,
            device=args.device,
        )

    parser = _verb(
        verbs, "caption", run, "write captions for pictures", "mmscale caption exports/toy photo.jpg folder/"
    )
    _add_model_arguments(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, folders, URLs or .tar shards")
    parser.add_argument("--limit", type=int, help="only the first so many pictures")
    parser.add_argument("--beams", type=int, default=1, help="beam search of this width (default: greedy)")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest words that hold this probability")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--batch", type=int, default=32, help="pictures of a forward pass (default: %(default)s)")
    parser.add_argument("--output", help="JSONL file for the captions")
    parser.add_argument("--picture", help="PNG file with the pictures and their captions")


def _add_export(verbs) -> None:
    def run(args: argparse.Namespace) -> None:
        shared = {"ema": args.ema, "say": print}
        if args.to == "clip-vision":
            from mmscale.export.clip_vision import export_clip_vision

            export_clip_vision(args.checkpoint, args.out, **shared)
        elif args.to == "open_clip":
            from mmscale.export.open_clip import export_open_clip

            export_open_clip(args.checkpoint, args.out, tokenizer=args.tokenizer, **shared)
        elif args.to == "peft":
            from mmscale.export.peft import export_peft

            export_peft(args.checkpoint, args.out, say=print)
        elif args.to == "onnx":
            from mmscale.export.onnx import export_onnx

            export_onnx(args.checkpoint, args.out, tokenizer=args.tokenizer, **shared)
        else:
            from mmscale.export.hub import export_hub

            card = {key: getattr(args, key) for key in ("scores", "name", "license", "data")}
            reuse = args.push is not None  # an upload that broke off goes on with the folder that is there
            export_hub(
                args.checkpoint, args.out, dtype=args.dtype, tokenizer=args.tokenizer, reuse=reuse, **card, **shared
            )
        if args.push:
            from mmscale.export.push import push_folder

            push_folder(args.out, args.push, private=not args.public, dry_run=args.dry_run)

    parser = _verb(
        verbs,
        "export",
        run,
        "write the trained model for others, and prove that it is the same",
        "mmscale export runs/toy exports/toy --scores runs/toy/scores.json",
    )
    parser.add_argument("checkpoint", help="a run folder (its newest whole checkpoint) or a checkpoint folder")
    parser.add_argument("out", help="folder to write; must be empty or not there")
    parser.add_argument(
        "--to",
        choices=["hub", "open_clip", "clip-vision", "onnx", "peft"],
        default="hub",
        help="Hugging Face Hub folder, open_clip checkpoint, the image tower as a stock CLIPVisionModel, both towers "
        "for onnxruntime, or the adapters of a run with model.lora for peft",
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the weights (hub)")
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a run that kept them")
    parser.add_argument("--tokenizer", help="a SentencePiece model instead of the checkpoint's own")
    parser.add_argument("--scores", help="JSON file of `mmscale eval`, for the model card")
    parser.add_argument("--name", help="the model's name on its card (default: the folder's)")
    parser.add_argument("--license", help="for the model card, as the Hub spells it: apache-2.0, mit, ...")
    parser.add_argument("--data", help="what the model was trained on, for the card")
    parser.add_argument("--push", metavar="USER/REPO", help="upload the folder to the Hugging Face Hub, private")
    parser.add_argument("--public", action="store_true", help="with --push: a repository that is made is public")
    parser.add_argument("--dry-run", action="store_true", help="with --push: only show what would be uploaded")


def _add_index(verbs) -> None:
    def run(args: argparse.Namespace) -> int:
        from mmscale.data.indexing import index_shards

        return index_shards(
            args.shards, index_dir=args.index_dir, cache_dir=args.cache_dir, manifest=args.manifest, processes=args.jobs
        )

    parser = _verb(
        verbs,
        "index",
        run,
        "write or check the offset tables of shards, and say what is damaged (then it ends with 1)",
        "mmscale index '/data/train-*.tar' --manifest /data/counts.json",
    )
    parser.add_argument("shards", nargs="+", help=_SHARDS)
    parser.add_argument("--index-dir", help="where the tables go when the shards' folder is read-only")
    parser.add_argument("--cache-dir", help="cache for remote shards")
    parser.add_argument("--manifest", help="JSON file for every shard's count, size and digest: data.counts reads it")
    parser.add_argument("--jobs", type=int, help="processes (default: the machine's cores)")


def _add_pack(verbs) -> None:
    def run(args: argparse.Namespace) -> None:
        from mmscale.data.pack import pack

        pack(
            args.source,
            args.out,
            image=args.image,
            text=args.text,
            shard_size=args.shard_size,
            longest_side=args.longest_side,
            quality=args.quality,
            processes=args.jobs,
        )

    parser = _verb(
        verbs,
        "pack",
        run,
        "make shards from a folder of pictures, or from a table of paths or URLs and captions",
        "mmscale pack photos.csv data/photos --image path --text caption --longest-side 512",
    )
    parser.add_argument("source", help="folder with sidecar .txt or .json files; or .csv, .tsv, .jsonl, .parquet")
    parser.add_argument("out", help="folder for the shards: new, or begun by the same command")
    parser.add_argument("--image", default="image", help="column with the path or URL (default: %(default)s)")
    parser.add_argument("--text", default="text", help="column with the caption (default: %(default)s)")
    parser.add_argument("--shard-size", type=int, default=1000, help="rows of a shard (default: %(default)s)")
    parser.add_argument(
        "--longest-side", type=int, help="pixels; larger pictures are made smaller (default: as they are)"
    )
    parser.add_argument(
        "--quality", type=int, default=90, help="of pictures made smaller, as JPEG (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, help="processes (default: the machine's cores)")


def _add_inspect(verbs) -> None:
    def run(args: argparse.Namespace) -> None:
        from mmscale.config import DataConfig
        from mmscale.data.inspection_page import inspect

        data = DataConfig(text_key=args.text_key, index_dir=args.index_dir, cache_dir=args.cache_dir)
        inspect(args.shards, html=args.html, tokenizer=args.tokenizer, data=data, limit=args.limit)

    parser = _verb(
        verbs,
        "inspect",
        run,
        "show what is in shards: sizes, captions, duplicates, broken samples",
        "mmscale inspect 'data/toy/train-*.tar' --html inspection.html",
    )
    parser.add_argument("shards", nargs="+", help=_SHARDS)
    parser.add_argument("--html", help="file for a page with histograms and a contact sheet")
    parser.add_argument("--tokenizer", help="SentencePiece model: caption lengths in its tokens (default: in words)")
    parser.add_argument("--limit", type=int, help="only the first so many samples")
    parser.add_argument(
        "--text-key", default="txt", help="where the captions are: txt or json.KEY (default: %(default)s)"
    )
    parser.add_argument("--index-dir", help="where the indexes go when the shards' folder is read-only")
    parser.add_argument("--cache-dir", help="cache for remote shards")


def _add_search(verbs) -> None:
    def run(args: argparse.Namespace) -> None:
        from mmscale.evaluate.search_command import search_command

        keys = ("top", "index", "html", "batch", "tokenizer", "ema", "device")
        search_command(args.model, args.queries, args.data, **{key: getattr(args, key) for key in keys})

    parser = _verb(
        verbs,
        "search",
        run,
        "find the pictures nearest to a text or to a picture",
        "mmscale search exports/toy --data 'data/toy/val-*.tar' 'a small red circle'",
    )
    _add_model_arguments(parser)
    parser.add_argument("queries", nargs="+", metavar="QUERY", help="a text, or a picture's file or URL")
    parser.add_argument(
        "--data",
        action="append",
        required=True,
        help="where to search: files, folders, URLs, .tar shards; may be repeated",
    )
    parser.add_argument("--top", type=int, default=10, help="pictures for each query (default: %(default)s)")
    parser.add_argument("--index", help="folder for the embeddings (default: in the user's cache)")
    parser.add_argument("--html", help="file for a page with the pictures")
    parser.add_argument("--batch", type=int, default=64, help="pictures of a forward pass (default: %(default)s)")


def _add_demo(verbs) -> None:
    def run(args: argparse.Namespace) -> None:
        from mmscale.evaluate.demo import demo_command

        keys = ("host", "port", "index", "tokenizer", "ema", "device")
        demo_command(args.model, args.data, **{key: getattr(args, key) for key in keys})

    parser = _verb(
        verbs,
        "demo",
        run,
        "serve a local web page to try the model",
        "mmscale demo exports/toy --data 'data/toy/val-*.tar'",
    )
    _add_model_arguments(parser)
    parser.add_argument("--data", action="append", default=[], help="pictures to search in; may be repeated")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--index", help="folder for the embeddings of --data (default: in the user's cache)")


def _add_plan(verbs) -> None:
    def run(args: argparse.Namespace) -> None:
        from mmscale.config import load_config
        from mmscale.plan import plan, sweep
        from mmscale.report.plan_tables import describe, draw_sweep, sweep_table

        config = load_config(args.config, args.overrides)
        base = plan(config, args.gpus, args.gpu, args.net, args.price, args.text_tokens)
        print(describe(base))
        if args.sweep:
            plans = list(sweep(base))
            print(f"\n{sweep_table(plans)}")
            draw_sweep(plans, args.sweep)
            print(f"\n{args.sweep}")

    parser = _verb(
        verbs,
        "plan",
        run,
        "work out memory, step time, communication and cost before anything is rented",
        "mmscale plan configs/coca_l14.yaml --gpus 256 --gpu h200 --price 2.5 --sweep scaling.png",
    )
    _add_config_arguments(parser)
    parser.add_argument("--gpus", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--gpu", default="h100", help="a100, h100, h200, ... (default: %(default)s)")
    parser.add_argument("--net", default="400Gb", help="bandwidth of each GPU between machines (default: %(default)s)")
    parser.add_argument("--price", type=float, help="of a GPU hour")
    parser.add_argument("--text-tokens", type=int, help="mean tokens of a caption")
    parser.add_argument(
        "--sweep", metavar="FILE.png", help="throughput and cost up to 4,096 GPUs, as table and picture"
    )


def _add_report(verbs) -> None:
    def run(args: argparse.Namespace) -> None:
        from mmscale.report.page import write_report

        print(write_report(args.runs, args.output))

    parser = _verb(
        verbs, "report", run, "write one HTML page about runs", "mmscale report runs/toy runs/other -o report.html"
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, shown side by side")
    parser.add_argument("-o", "--output", default="report.html", help="the page (default: %(default)s)")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run folder, a checkpoint folder or an exported folder")
    parser.add_argument("--tokenizer", help="a SentencePiece model instead of the one beside the weights")
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a run that kept them")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")


_SHARDS = "path, glob, braces or @list.txt"
_VERBS = [
    _add_toy,
    _add_tokenizer,
    _add_pack,
    _add_index,
    _add_inspect,
    _add_train,
    _add_adapt,
    _add_eval,
    _add_caption,
    _add_search,
    _add_demo,
    _add_export,
    _add_report,
    _add_plan,
]
