"""What a judge says of the answer, as a term; within Task-Aware or Helpful.

Judges see the answer after the thinking. With `both` the thinking is judged too, in a call of its own, and the two
values are multiplied, as SafeWork-R1's (unused) Think variants do: an unsafe thinking then undoes a safe answer.
"""

import asyncio

from ..judges.endpoint import EndpointError
from ..judges.judge import JudgeClient, ScalarJudge
from ..judges.verdict import Unparsable
from ..rollout.values import Response
from .base import Failed, Outcome, Score
from .format import answer_of, thinking_of


class JudgeTerm:
    """What a chat judge or a scalar head says of the answer; an empty answer is worth 0, and nobody is asked."""

    def __init__(self, client: JudgeClient, *, both: bool = False) -> None:
        self.client, self.both = client, both

    async def __call__(self, response: Response) -> Outcome:
        judge, row, answer = self.client.judge, response.row, answer_of(response.text)
        if not answer:
            return Score(0.0)
        try:
            if isinstance(judge, ScalarJudge):
                return Score((await self.client.verdict(row, answer)).probability or 0.0)
            thinking = thinking_of(response.text)
            if not (self.both and judge.thinking_value and thinking):
                return Score(judge.value(await self.client.verdict(row, answer), row))
            said, thought = await asyncio.gather(self.client.verdict(row, answer), self.client.verdict(row, thinking))
            return Score(judge.value(said, row) * judge.thinking_value(thought, row))
        except (EndpointError, Unparsable) as error:
            return Failed(f"{judge.name}: {error}")
