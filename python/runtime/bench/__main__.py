import sys

from runtime.bench import main

sys.exit(main())
