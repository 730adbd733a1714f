"""Opens files of tables, one format each, as Arrow batches of the columns that are wanted: never the whole
file at once. pyarrow reads them all; DECISIONS.md says why."""
