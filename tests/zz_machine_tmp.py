from hypothesis import Phase
from dray.testing.transport_machine import run_machine
from tests.test_conformance_rabbitmq import *
pytestmark = pytest.mark.timeout(600)
class TestM1(TestRabbitMQ):
    def test_state_machine(self): run_machine(self, None, (Phase.generate,))
class TestM2(TestRabbitMQClassic):
    def test_state_machine(self): run_machine(self, None, (Phase.generate,))
class TestM3(TestRabbitMQPriorities):
    def test_state_machine(self): run_machine(self, None, (Phase.generate,))
class TestM4(TestRabbitMQClassicPriorities):
    def test_state_machine(self): run_machine(self, None, (Phase.generate,))
