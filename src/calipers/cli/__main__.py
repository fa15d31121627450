"""``python -m calipers.cli``, which is also how torchrun starts it."""

from calipers.cli import main

main()
