"""Methods that GS is compared with. Every one emits predictions."""
