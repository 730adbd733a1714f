"""Shows what each way of compressing costs on a shop before one is chosen: `peregrine compare`."""
