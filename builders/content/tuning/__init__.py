"""Fine-tunes a shop's encoders of titles and pictures on the shop itself: `peregrine encoders tune`."""
