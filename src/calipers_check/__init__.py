"""An independent checker of certificates: NumPy and onnx only, and nothing of the program that wrote them.

It is all that has to be trusted. `check` reads in this order: `container` (bytes), `onnx_file`, `layers`, `lattice` and
`table` (the network), `vnnlib` (the property), `tree` (the certificate's arrays), `prove` (walking the tree), `bounds`
and `smooth` (what is computed at a node). The format is in docs/certificates.md.
"""

from calipers_check.check import Accepted as Accepted
from calipers_check.check import check as check
from calipers_check.errors import Refused as Refused
from calipers_check.errors import Unusable as Unusable
