"""Methods that GS is compared with, and sources of coarse masks for the refiners; `registry` lists them, without torch."""
