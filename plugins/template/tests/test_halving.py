from cakeflow_template import Halving

from cakeflow.testing import AllocatorContract


class TestHalving(AllocatorContract):
    allocator = Halving()
