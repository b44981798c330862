//! Sampling: what each parameter means, and that nothing but its key decides a draw.

mod common;

use ashlar_kernels::{Isa, Kernels, SampleError, SamplerScratch, SamplerState, math, sampling};
use ashlar_vocabulary::{SamplingParams, TokenId};
use common::{all_kernels, numbers};

fn sample(params: &SamplingParams, logits: &[f32], position: u32) -> TokenId {
    let state = SamplerState::new(params, &[]);
    let sampled = state.sample(
        &all_kernels()[0],
        &mut logits.to_vec(),
        position,
        0,
        None,
        &mut SamplerScratch::default(),
    );
    sampled.expect("a token").token
}

/// How often each token comes out over many positions.
fn frequencies(params: &SamplingParams, logits: &[f32], draws: u32) -> Vec<u32> {
    let mut counts = vec![0; logits.len()];
    (0..draws).for_each(|position| counts[sample(params, logits, position) as usize] += 1);
    counts
}

fn log(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln()).collect()
}

/// χ² of observed counts against expected probabilities.
fn chi_square(counts: &[u32], probabilities: &[f64]) -> f64 {
    let total: u32 = counts.iter().sum();
    counts
        .iter()
        .zip(probabilities)
        .filter(|&(_, &p)| p > 0.0)
        .map(|(&count, p)| (f64::from(count) - p * f64::from(total)).powi(2) / (p * f64::from(total)))
        .sum()
}

#[test]
fn draws_follow_the_distribution_with_and_without_truncation() {
    let probabilities = [0.4f32, 0.05, 0.25, 0.2, 0.1];
    let exact = probabilities.map(f64::from);
    let logits = log(&probabilities);
    // 99.9 % quantile of χ² with four degrees of freedom: 18.5.
    let plain = SamplingParams { seed: 5, ..SamplingParams::default() };
    assert!(chi_square(&frequencies(&plain, &logits, 20_000), &exact) < 18.5);
    let by_k = SamplingParams { top_k: 5, ..plain.clone() };
    assert!(chi_square(&frequencies(&by_k, &logits, 20_000), &exact) < 18.5);
    let hot = SamplingParams { temperature: 2.0, ..plain };
    let roots = exact.map(f64::sqrt);
    let total: f64 = roots.iter().sum();
    assert!(chi_square(&frequencies(&hot, &logits, 20_000), &roots.map(|root| root / total)) < 18.5);
}

#[test]
fn draws_from_a_large_vocabulary_follow_the_distribution() {
    // 1,000 tokens in ten groups of equal mass, over several runs of 256.
    let counts = frequencies(&SamplingParams { seed: 9, ..SamplingParams::default() }, &[0.5; 1000], 20_000);
    let groups: Vec<u32> = counts.chunks(100).map(|group| group.iter().sum()).collect();
    assert!(chi_square(&groups, &[0.1; 10]) < 27.9, "{groups:?}");
}

#[test]
fn truncation_keeps_the_tokens_it_should() {
    let logits = log(&[0.4, 0.05, 0.25, 0.2, 0.1]);
    let kept = |params: SamplingParams| -> Vec<usize> {
        let counts = frequencies(&params, &logits, 2_000);
        (0..5).filter(|&token| counts[token] > 0).collect()
    };
    let default = SamplingParams::default();
    assert_eq!(kept(SamplingParams { top_k: 1, ..default.clone() }), [0]);
    assert_eq!(kept(SamplingParams { top_k: 3, ..default.clone() }), [0, 2, 3]);
    assert_eq!(kept(SamplingParams { top_p: 0.01, ..default.clone() }), [0]);
    assert_eq!(kept(SamplingParams { top_p: 0.6, ..default.clone() }), [0, 2]);
    assert_eq!(kept(SamplingParams { top_p: 0.84, ..default.clone() }), [0, 2, 3]);
    assert_eq!(kept(SamplingParams { top_p: 0.94, ..default.clone() }), [0, 2, 3, 4]);
    assert_eq!(kept(SamplingParams { min_p: 0.45, ..default.clone() }), [0, 2, 3]);
    assert_eq!(kept(SamplingParams { min_p: 1.0, ..default.clone() }), [0]);
    // The nucleus refers to the mass that top_k left: of 0.4, 0.25, 0.2 the first two have 76 %.
    assert_eq!(kept(SamplingParams { top_k: 3, top_p: 0.75, ..default.clone() }), [0, 2]);
    // Temperature comes first: at ½ the probabilities are 0.16, 0.0025, 0.0625, 0.04, 0.01 of 0.275.
    assert_eq!(kept(SamplingParams { temperature: 0.5, top_p: 0.8, ..default }), [0, 2]);
}

/// The definition of truncation and draw, with a full sort.
fn by_definition(params: &SamplingParams, logits: &[f32], position: u32) -> TokenId {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let p = logits.iter().map(|logit| math::exp_f32((logit - max) / params.temperature));
    let mut kept: Vec<(TokenId, f32)> = (0..).zip(p).filter(|&(_, p)| p > 0.0).collect();
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if params.top_k > 0 {
        kept.truncate(params.top_k as usize);
    }
    let total: f64 = kept.iter().map(|&(_, p)| f64::from(p)).sum();
    let mut mass = 0.0;
    kept.retain(|&(_, p)| {
        let needed = mass < f64::from(params.top_p) * total;
        mass += f64::from(p);
        needed && p >= params.min_p
    });
    kept.sort_by_key(|&(token, _)| token);
    let total: f64 = kept.iter().map(|&(_, p)| f64::from(p)).sum();
    let mut rest = sampling::uniform(params.seed, params.choice_index, position) * total;
    let chosen = kept.iter().find(|&&(_, p)| {
        rest -= f64::from(p);
        rest < 0.0
    });
    chosen.expect("a token").0
}

#[test]
fn draws_from_large_vocabularies_match_the_definition() {
    for (seed, scale) in [(1, 0.1), (2, 1.0), (3, 4.0)] {
        let logits: Vec<f32> = numbers(5_003, seed).iter().map(|x| x * scale).collect();
        for (top_k, top_p, min_p, temperature) in [
            (0, 1.0, 0.0, 1.0),
            (0, 1.0, 0.05, 1.5),
            (0, 0.9, 0.0, 1.0),
            (0, 0.5, 0.1, 0.7),
            (1, 1.0, 0.0, 1.0),
            (40, 1.0, 0.0, 0.8),
            (1000, 0.95, 0.02, 1.0),
            (9000, 0.99, 0.0, 2.0),
        ] {
            let params =
                SamplingParams { seed, top_k, top_p, min_p, temperature, ..SamplingParams::default() };
            for position in 0..60 {
                let expected = by_definition(&params, &logits, position);
                assert_eq!(sample(&params, &logits, position), expected, "{params:?} at {position}");
            }
        }
    }
}

#[test]
fn ties_break_by_token_id() {
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    assert_eq!(sample(&greedy, &[1.0, 3.0, 3.0, 2.0], 0), 1);
    let top = SamplingParams { top_k: 2, ..SamplingParams::default() };
    let counts = frequencies(&top, &[0.0; 6], 200);
    assert!(counts[0] > 0 && counts[1] > 0 && counts[2..].iter().all(|&count| count == 0), "{counts:?}");
}

#[test]
fn a_draw_is_keyed_by_seed_choice_and_position_alone() {
    let logits = numbers(5000, 3);
    let mut by_way = Vec::new();
    for params in [
        SamplingParams { seed: 77, ..SamplingParams::default() },
        SamplingParams { seed: 77, top_p: 0.9, top_k: 400, min_p: 0.001, ..SamplingParams::default() },
    ] {
        for kernels in all_kernels() {
            let (state, mut scratch) = (SamplerState::new(&params, &[1, 2]), SamplerScratch::default());
            let tokens: Vec<TokenId> = (0..40)
                .rev()
                .map(|at| {
                    state
                        .sample(kernels, &mut logits.clone(), at, 0, None, &mut scratch)
                        .expect("a token")
                        .token
                })
                .collect();
            by_way.push(tokens);
        }
        let first = by_way[0].clone();
        assert!(by_way.drain(..).all(|tokens| tokens == first));
        let other =
            |params: SamplingParams| (0..40).rev().map(|at| sample(&params, &logits, at)).collect::<Vec<_>>();
        assert_ne!(other(SamplingParams { seed: 78, ..params.clone() }), first);
        assert_ne!(other(SamplingParams { choice_index: 1, ..params }), first);
    }
}

#[test]
fn penalties_bias_and_held_back_tokens_change_the_choice() {
    let kernels = &all_kernels()[0];
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let choose = |params: &SamplingParams, prompt: &[TokenId], seen: &[TokenId], mask: Option<&[u32]>| {
        let mut state = SamplerState::new(params, prompt);
        seen.iter().for_each(|&token| state.observe(token));
        let logits = &mut [3.0, 2.5, -1.0, 2.0];
        let mut scratch = SamplerScratch::default();
        state.sample(kernels, logits, 0, seen.len() as u32, mask, &mut scratch).map(|sampled| sampled.token)
    };
    assert_eq!(choose(&greedy, &[], &[], None), Ok(0));
    let bias = SamplingParams { logit_bias: vec![(0, -100.0), (3, 1.0)], ..greedy.clone() };
    assert_eq!(choose(&bias, &[], &[], None), Ok(3));
    let presence = SamplingParams { presence_penalty: 0.6, ..greedy.clone() };
    assert_eq!(choose(&presence, &[0], &[], None), Ok(0), "the prompt does not count");
    assert_eq!(choose(&presence, &[], &[0], None), Ok(1));
    let frequency = SamplingParams { frequency_penalty: 0.3, ..greedy.clone() };
    assert_eq!(choose(&frequency, &[], &[0], None), Ok(0));
    assert_eq!(choose(&frequency, &[], &[0, 0], None), Ok(1));
    let repetition = SamplingParams { repetition_penalty: 1.25, ..greedy.clone() };
    assert_eq!(choose(&repetition, &[0, 0], &[], None), Ok(1), "the prompt counts, once");
    assert_eq!(choose(&repetition, &[0], &[0, 1], None), Ok(0), "3/1.25 against 2.5/1.25 and 2");
    let hold = SamplingParams { min_tokens: 2, stop_token_ids: vec![0], ..greedy.clone() };
    assert_eq!(choose(&hold, &[], &[3], None), Ok(1));
    assert_eq!(choose(&hold, &[], &[3, 3], None), Ok(0));
    assert_eq!(choose(&greedy, &[], &[], Some(&[0b1100])), Ok(3));
    assert_eq!(choose(&greedy, &[], &[], Some(&[])), Err(SampleError::NothingAllowed));
}

#[test]
fn logits_that_are_not_finite_are_reported() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut logits = vec![0.5; 100];
        logits[57] = bad;
        let state = SamplerState::new(&SamplingParams::default(), &[]);
        let result = state.sample(&all_kernels()[0], &mut logits, 0, 0, None, &mut SamplerScratch::default());
        assert_eq!(result, Err(SampleError::NotFinite));
    }
}

#[test]
fn logprobs_come_from_the_raw_logits() {
    let logits = log(&[0.5, 0.125, 0.25, 0.125]);
    let params = SamplingParams {
        temperature: 0.0,
        logit_bias: vec![(0, -50.0)],
        top_logprobs: Some(3),
        ..SamplingParams::default()
    };
    let state = SamplerState::new(&params, &[]);
    let kernels = Kernels::new(Isa::best(), 1);
    let mut scratch = SamplerScratch::default();
    let sampled = state.sample(&kernels, &mut logits.clone(), 0, 0, None, &mut scratch).expect("a token");
    assert_eq!(sampled.token, 2);
    let logprobs = sampled.logprobs.expect("they were asked for");
    assert!((logprobs.logprob - 0.25f32.ln()).abs() < 1e-6);
    assert_eq!(logprobs.top.iter().map(|top| top.token).collect::<Vec<_>>(), [0, 2, 1]);
    assert_eq!(sampling::score(&kernels, &logits, 2, 3), Ok(logprobs));
}
