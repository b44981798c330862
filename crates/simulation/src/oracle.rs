//! The "model": a hash of all tokens so far. Any misplaced, missing or foreign KV entry changes it.

use ashlar_vocabulary::TokenId;

/// Tokens of the vocabulary.
const VOCAB: u64 = 500;
const EMPTY: u64 = 0x9e37_79b9_7f4a_7c15;

/// Every bit of both counts.
pub(crate) fn mix(state: u64, value: u64) -> u64 {
    let mixed = (state ^ value.wrapping_mul(0xff51_afd7_ed55_8ccd)).rotate_left(29);
    mixed.wrapping_mul(0xc4ce_b9fe_1a85_ec53).wrapping_add(1)
}

/// What a sequence begins with: the model alone, or with an adapter that comes to this.
pub(crate) fn beginning(adapter: Option<u64>) -> u64 {
    adapter.map_or(EMPTY, |digest| mix(EMPTY, digest))
}

/// What a rank's KV cache holds at a position with this token, after the state before it.
pub(crate) fn after(state: u64, token: TokenId) -> u64 {
    mix(state, u64::from(token))
}

/// What a rank's KV cache holds at each position.
pub(crate) fn states(tokens: &[TokenId], adapter: Option<u64>) -> Vec<u64> {
    let step = |state: &mut u64, token: &TokenId| {
        *state = mix(*state, u64::from(*token));
        Some(*state)
    };
    tokens.iter().scan(beginning(adapter), step).collect()
}

/// The token sampled after a position with this state.
pub(crate) fn sample(state: u64, seed: u64) -> TokenId {
    (mix(state, seed) % VOCAB) as TokenId
}

/// The slice `index` of the logits after a position with this state.
pub(crate) fn slice(state: u64, index: u64) -> u64 {
    mix(state, !index)
}

/// What the model continues `prompt` with, whoever schedules it.
pub(crate) fn continuation(
    prompt: &[TokenId],
    adapter: Option<u64>,
    seed: u64,
    count: usize,
) -> Vec<TokenId> {
    let mut state = states(prompt, adapter).pop().unwrap_or(beginning(adapter));
    let mut generated = Vec::with_capacity(count);
    for _ in 0..count {
        let token = sample(state, seed);
        generated.push(token);
        state = mix(state, u64::from(token));
    }
    generated
}
