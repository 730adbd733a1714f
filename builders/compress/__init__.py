"""Stage `compress`: prune, distil, quantize by sensitivity; and the gate that proves the ranking did not
suffer."""
