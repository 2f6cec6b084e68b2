"""The later name of a cache, ``cache``, on models of transformers before 5.24; later ones have it themselves."""

import pytest
from torch import nn

from swan import attach, detach
from swan.integrations.transformers.keyword import accept_cache, cache_keyword
from tests.tiny import calibration_of, tiny


class Body(nn.Module):
    """Returns what it was given for a cache."""

    def forward(self, ids, past_key_values=None):
        return ids, past_key_values


class Model(Body):
    def __init__(self):
        super().__init__()
        self.base_model = Body()

    def generate(self, ids, past_key_values=None):
        return self(ids, past_key_values=past_key_values)


def test_a_cache_is_taken_by_the_model_and_its_body():
    model = Model()
    assert cache_keyword(model) == "past_key_values"
    hooks = accept_cache(model)
    for call in (model, model.base_model, model.generate):
        assert call("ids", cache="held") == call("ids", past_key_values="held") == ("ids", "held")
        assert call("ids", cache="held", past_key_values=None) == ("ids", "held")
        assert call("ids") == ("ids", None)
        with pytest.raises(ValueError, match="give the cache as cache or as past_key_values, not as both"):
            call("ids", cache="held", past_key_values="other")
    for hook in hooks:
        hook.remove()
    with pytest.raises(TypeError, match="unexpected keyword argument 'cache'"):
        model("ids", cache="held")


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_detach_takes_the_name_back(monkeypatch):
    monkeypatch.setattr("swan.integrations.transformers.keyword.cache_keyword", lambda _: "past_key_values")
    model = tiny()
    attach(model, calibration_of(model))
    assert model._forward_pre_hooks and model.base_model._forward_pre_hooks and "generate" in vars(model)
    detach(model)
    assert not model._forward_pre_hooks and not model.base_model._forward_pre_hooks and "generate" not in vars(model)
