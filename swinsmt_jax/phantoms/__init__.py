"""The body plan of the phantoms: solids, a canvas, bones, muscles, organs, vessels."""
