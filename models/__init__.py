"""How the bundled checkpoint is made: drawings, autoencoder, UNet with text encoder, evaluation. See README.md."""

from worker.engines.diffusion import quiet as quiet
