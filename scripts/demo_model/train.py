"""Makes the demo model from a seed: tokenizers, autoencoder, text encoders, transformer, checkpoint.

Run from the repository's root: `python -m scripts.demo_model.train`. Each part goes on where it was
interrupted; `--install-only` installs what is trained so far.
"""

import argparse
from pathlib import Path

import torch

from scripts.demo_model.checkpoint_folder import write_checkpoint
from scripts.demo_model.latents import PICTURE_SIZES, encode_scenes
from scripts.demo_model.prompt_tokenizers import train_tokenizers
from scripts.demo_model.text_encoders import train_text_encoders
from scripts.demo_model.training import averaged_transformer, train_transformer
from scripts.demo_model.vae import train_vae

_REPOSITORY = Path(__file__).resolve().parents[2]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("demo_model_training"), help="states and latents (0.6 GB)"
    )
    parser.add_argument("--output", type=Path, default=_REPOSITORY / "hidream_grpc" / "demo_checkpoint")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vae-steps", type=int, default=1400)
    parser.add_argument("--text-steps", type=int, default=2100)
    parser.add_argument("--transformer-steps", type=int, default=6000)
    parser.add_argument("--processes", type=int, default=2, help="single-threaded processes, one a core")
    parser.add_argument("--install-only", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Train what is not yet trained, and install the checkpoint."""
    arguments = _arguments()
    torch.set_num_threads(1)
    vae = train_vae(arguments.work, arguments.vae_steps, arguments.seed)
    tokenizers = train_tokenizers(arguments.seed)
    encoders = train_text_encoders(arguments.work, tokenizers, arguments.text_steps, arguments.seed)
    if not arguments.install_only:
        for size in PICTURE_SIZES:
            encode_scenes(arguments.work, vae, size, arguments.seed)
        train_transformer(
            arguments.work, encoders, arguments.transformer_steps, arguments.seed, arguments.processes
        )
    size_bytes = write_checkpoint(arguments.output, encoders, averaged_transformer(arguments.work), vae)
    print(f"installed {arguments.output} ({size_bytes / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
