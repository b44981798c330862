//! What a transcript promises, for any cut of a text into tokens.

use super::*;
use ashlar_vocabulary::RequestId;
use proptest::prelude::*;

/// Token `i` stands for the bytes at `i`; characters may be cut anywhere.
#[derive(Debug, Clone)]
struct Bytes {
    pieces: Vec<Vec<u8>>,
    held: Vec<u8>,
}

impl TokenDecoder for Bytes {
    fn push(&mut self, token: TokenId) -> String {
        self.held.extend(&self.pieces[token as usize]);
        let valid = match std::str::from_utf8(&self.held) {
            Ok(all) => all.len(),
            Err(error) => error.valid_up_to(),
        };
        let rest = self.held.split_off(valid);
        String::from_utf8(std::mem::replace(&mut self.held, rest)).unwrap_or_default()
    }

    fn finish(&mut self) -> String {
        if self.held.is_empty() { String::new() } else { "\u{fffd}".to_owned() }
    }
}

const ID: ChoiceId = ChoiceId { request: RequestId(7), choice: 0 };

fn transcript(pieces: &[&[u8]], stops: &[&str], stop_tokens: &[TokenId]) -> Transcript<Bytes> {
    let spec = TranscriptSpec {
        id: ID,
        prompt: vec![1, 2, 3].into(),
        stop_strings: stops.iter().map(|stop| (*stop).to_owned()).collect(),
        include_stop: false,
        stop_tokens: stop_tokens.to_vec(),
        keep_logprobs: false,
        min_tokens: 0,
    };
    let pieces = pieces.iter().map(|piece| piece.to_vec()).collect();
    Transcript::new(Duration::ZERO, spec, Bytes { pieces, held: Vec::new() })
}

fn token(index: u32, token: TokenId) -> TranscriptEvent {
    TranscriptEvent::Token(TokenEvent { id: ID, index, token, logprobs: None, cached_tokens: 2, queue_ms: 3 })
}

fn finished() -> TranscriptEvent {
    TranscriptEvent::Finished { reason: FinishReason::Stop, receipt: Receipt::default() }
}

/// Feeds events a millisecond apart.
fn run(transcript: &mut Transcript<Bytes>, events: impl IntoIterator<Item = TranscriptEvent>) -> Vec<Effect> {
    let mut effects = Vec::new();
    for (at, event) in events.into_iter().enumerate() {
        transcript.handle(Duration::from_millis(at as u64), event, &mut effects);
    }
    effects
}

fn text(effects: &[Effect]) -> String {
    effects
        .iter()
        .map(|effect| match effect {
            Effect::Deliver(delta) => delta.text.as_str(),
            _ => "",
        })
        .collect()
}

fn tokens(effects: &[Effect]) -> Vec<TokenId> {
    effects
        .iter()
        .flat_map(|effect| match effect {
            Effect::Deliver(delta) => delta.tokens.iter().map(|token| token.token).collect(),
            _ => Vec::new(),
        })
        .collect()
}

fn failed(effects: &[Effect]) -> bool {
    matches!(effects.last(), Some(Effect::End(End::Failed(_))))
}

#[test]
fn a_duplicate_never_reaches_the_client_and_a_gap_ends_the_choice_with_an_error() {
    let mut duplicated = transcript(&[b"a", b"b"], &[], &[]);
    let effects = run(&mut duplicated, [token(0, 0), token(0, 0), token(1, 1), token(0, 1), finished()]);
    assert_eq!(text(&effects), "ab");
    assert_eq!(duplicated.delivered(), [0, 1]);

    let mut gapped = transcript(&[b"a", b"b"], &[], &[]);
    let effects = run(&mut gapped, [token(0, 0), token(2, 1), token(1, 1), finished()]);
    assert_eq!(text(&effects), "a");
    assert!(effects.contains(&Effect::Cancel) && failed(&effects));
}

#[test]
fn a_stop_string_across_tokens_cancels_and_what_follows_is_dropped() {
    let mut transcript = transcript(&[b"one ", b"<en", b"d> tw", b"o"], &["<end>"], &[]);
    let effects = run(&mut transcript, [token(0, 0), token(1, 1), token(2, 2), token(3, 3), finished()]);
    assert_eq!(text(&effects), "one ");
    assert_eq!(tokens(&effects), [0], "tokens of the stop string are no output");
    assert_eq!(transcript.delivered().len(), 3, "usage counts what it took to find it, no overshoot");
    let ends: Vec<&Effect> = effects.iter().filter(|e| !matches!(e, Effect::Deliver(_))).collect();
    assert!(matches!(
        ends[..],
        [Effect::Cancel, Effect::End(End::Finished { reason: FinishReason::Stop, receipt })]
            if receipt.generated_tokens == 3
    ));
}

#[test]
fn a_token_that_only_begins_before_the_stop_string_is_kept() {
    let mut transcript = transcript(&[b"ab<", b"end>"], &["<end>"], &[]);
    let effects = run(&mut transcript, [token(0, 0), token(1, 1)]);
    assert_eq!((text(&effects).as_str(), tokens(&effects)), ("ab", vec![0]));
}

#[test]
fn the_stop_token_is_hidden_but_counted() {
    let mut transcript = transcript(&[b"a", b"</s>"], &[], &[1]);
    let effects = run(&mut transcript, [token(0, 0), token(1, 1), finished()]);
    assert_eq!((text(&effects).as_str(), tokens(&effects)), ("a", vec![0]));
    assert_eq!(transcript.delivered().len(), 2);
}

#[test]
fn characters_are_never_split_and_a_broken_one_is_replaced_at_the_end() {
    let mut whole = transcript(&[&[0xe2, 0x82], &[0xac, b'!']], &[], &[]);
    let effects = run(&mut whole, [token(0, 0), token(1, 1), finished()]);
    assert!(matches!(&effects[0], Effect::Deliver(delta) if delta.text == "€!" && delta.tokens.len() == 2));

    let mut broken = transcript(&[b"a", &[0xe2]], &[], &[]);
    let effects = run(&mut broken, [token(0, 0), token(1, 1), finished()]);
    assert_eq!((text(&effects).as_str(), tokens(&effects)), ("a\u{fffd}", vec![0, 1]));
}

#[test]
fn prompt_logprobs_arrive_once_and_in_range() {
    let described = |count: usize| {
        let logprobs = vec![TokenLogprobs { logprob: -1.0, top: Vec::new() }; count];
        TranscriptEvent::PromptLogprobs { position: 1, logprobs }
    };
    let mut good = transcript(&[], &[], &[]);
    run(&mut good, [described(2), described(2)]);
    assert_eq!(good.prompt_logprobs().iter().map(Option::is_some).collect::<Vec<_>>(), [false, true, true]);
    assert!(failed(&run(&mut transcript(&[], &[], &[]), [described(3)])));
}

#[test]
fn nothing_follows_the_end() {
    let mut transcript = transcript(&[b"a"], &[], &[]);
    let gone = run(&mut transcript, [TranscriptEvent::ClientGone, token(0, 0), finished()]);
    assert_eq!(gone, [Effect::Cancel]);
}

#[test]
fn stop_strings_wait_for_min_tokens() {
    let mut transcript = transcript(&[b"x", b"x", b"x"], &["x"], &[]);
    transcript.spec.min_tokens = 2;
    assert_eq!(text(&run(&mut transcript, [token(0, 0), token(1, 1), token(2, 2)])), "xx");
    assert!(transcript.ended());
}

proptest! {
    /// The definition of a stop string does not mention tokens.
    #[test]
    fn any_cut_into_tokens_gives_the_output_of_the_whole_text(
        whole in "[ab€é]{0,40}",
        cuts in prop::collection::vec(1usize..5, 1..80),
        stops in prop::collection::vec("[ab€é]{1,4}", 0..4),
    ) {
        let mut pieces = Vec::new();
        let mut rest = whole.as_bytes();
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, next) = rest.split_at((*cut).min(rest.len()));
            pieces.push(piece);
            rest = next;
        }
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let hit = stops.iter().filter_map(|stop| whole.find(stop).map(|at| (at + stop.len(), at))).min();

        let mut transcript = transcript(&pieces, &stops, &[]);
        let events: Vec<_> = (0..pieces.len() as u32).map(|i| token(i, i)).chain([finished()]).collect();
        let effects = run(&mut transcript, events);

        let expected = hit.map_or(whole.as_str(), |(_, start)| &whole[..start]);
        prop_assert_eq!(text(&effects), expected);
        prop_assert_eq!(effects.contains(&Effect::Cancel), hit.is_some());
        // The tokens delivered are those whose characters begin in the output, in order.
        let given = tokens(&effects);
        prop_assert_eq!(&given, &(0..given.len() as u32).collect::<Vec<_>>());
        if hit.is_none() {
            prop_assert_eq!(given.len(), pieces.len());
        }
        prop_assert!(pieces.iter().take(given.len()).map(|piece| piece.len()).sum::<usize>() >= expected.len());
    }
}

#[test]
fn a_scheduler_that_is_reached_again_gets_what_has_been_delivered() {
    let mut transcript = transcript(&[b"a", b"b", b"c"], &[], &[]);
    let effects = run(
        &mut transcript,
        [TranscriptEvent::SchedulerBack, token(0, 0), token(1, 1), TranscriptEvent::SchedulerBack],
    );
    let resubmitted = effects.iter().filter_map(|effect| match effect {
        Effect::Resubmit { forced } => Some(forced.clone()),
        _ => None,
    });
    assert_eq!(resubmitted.collect::<Vec<_>>(), [vec![], vec![0, 1]]);
    // What the lost one had said of token 1 comes again with the next one, and counts once.
    let rest = run(&mut transcript, [token(1, 1), token(2, 2), finished()]);
    let [Effect::Deliver(delta), Effect::End(End::Finished { receipt, .. })] = rest.as_slice() else {
        panic!("{rest:?}")
    };
    assert_eq!((delta.text.as_str(), receipt.replays), ("c", 2));
    assert!(run(&mut transcript, [TranscriptEvent::SchedulerBack]).is_empty(), "it is over");
}

#[test]
fn prompt_logprobs_that_come_again_in_other_pieces_count_once() {
    let described = |logprob: f32| TokenLogprobs { logprob, top: Vec::new() };
    let mut transcript = transcript(&[b"a"], &[], &[]);
    let pieces = [(1, vec![-1.0]), (1, vec![-9.0, -2.0]), (2, vec![-9.0])];
    let events = pieces.map(|(position, values)| TranscriptEvent::PromptLogprobs {
        position,
        logprobs: values.into_iter().map(described).collect(),
    });
    assert!(run(&mut transcript, events).is_empty());
    assert_eq!(transcript.prompt_logprobs(), [None, Some(described(-1.0)), Some(described(-2.0))]);
}
