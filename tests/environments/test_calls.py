from llmrl.environments.calls import ToolCall


def test_a_call_without_arguments_has_its_own_empty_ones():
    first, second = ToolCall("now"), ToolCall("now")
    first.arguments["zone"] = "UTC"
    assert second.arguments == {}
    assert (second.id, second.problem) == (None, None)
