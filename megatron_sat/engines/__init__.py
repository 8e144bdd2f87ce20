"""Who moves the gradients: one protocol, one engine on megatron.core. Nothing here knows that models can be sparse."""
