"""`peregrine compare`: shows what each way of compressing costs on a shop before one is chosen."""
