//! Responses that outlive the connection over which they were asked for: who follows, what the store is told, and what becomes of those
//! that nobody follows.
#![allow(clippy::unwrap_used)]

use ashlar_protocol::admin::{AdminFailureKind, AdminReply};
use ashlar_protocol::responses::{ResponseCall, ResponseOutcome, ResponseRecord, ResponseStatus};
use ashlar_protocol::serving::{
    ChoiceId, FailureKind, FinishReason, FromScheduler, Receipt, RequestFailure, Submit, TokenEvent,
};
use ashlar_scheduler::engine::GatewayId;
use ashlar_scheduler::responses::{Effect, Event, Responses, ResponsesConfig};
use ashlar_scheduler::time::Millis;
use ashlar_vocabulary::{BlobId, ModelDigest, RequestId, SamplingParams, TokenId};

const GRACE_MS: u64 = 30_000;
const ONE: GatewayId = GatewayId(1);
const TWO: GatewayId = GatewayId(2);

struct World {
    now: Millis,
    core: Responses,
    effects: Vec<Effect>,
}

fn blob(byte: u8) -> BlobId {
    BlobId([byte; 32])
}

fn choice(id: u128) -> ChoiceId {
    ChoiceId { request: RequestId(id), choice: 0 }
}

fn record(id: u128, background: bool) -> ResponseRecord {
    ResponseRecord {
        id: RequestId(id),
        created_at: 1_000 + id as u64,
        background,
        request: blob(1),
        outcome: None,
        owner: None,
        key: None,
    }
}

fn answered(record: ResponseRecord, status: ResponseStatus) -> ResponseRecord {
    ResponseRecord { outcome: Some(ResponseOutcome { status, answer: Some(blob(2)) }), ..record }
}

fn submit(id: u128, forced: &[TokenId]) -> Box<Submit> {
    Box::new(Submit {
        id: choice(id),
        model_digest: ModelDigest([9; 32]),
        adapter: None,
        prompt: vec![1, 2, 3],
        forced: forced.to_vec(),
        forced_logprobs: Vec::new(),
        kept: true,
        max_new_tokens: 2_000,
        stop_tokens: Vec::new(),
        sampling: SamplingParams::default(),
        tenant_salt: 0,
        charge: None,
        priority: 0,
        deadline_ms: 0,
        traceparent: None,
    })
}

impl World {
    fn new() -> World {
        let config = ResponsesConfig { resume_grace_ms: GRACE_MS, kept_s: 100, max: 4 };
        let mut world = World { now: Millis(5_000), core: Responses::new(config), effects: Vec::new() };
        world.event(Event::GatewayUp(ONE));
        world.event(Event::GatewayUp(TWO));
        world
    }

    /// What the core wants done after an event.
    fn event(&mut self, event: Event) -> Vec<Effect> {
        self.core.handle(self.now, event, &mut self.effects);
        self.core.check().unwrap();
        std::mem::take(&mut self.effects)
    }

    fn after(&mut self, ms: u64) -> Vec<Effect> {
        self.now = self.now.plus(ms);
        self.event(Event::Tick)
    }

    fn call(&mut self, gateway: GatewayId, wish: ResponseCall) -> Vec<Effect> {
        self.event(Event::Call { gateway, call: 7, tenant: None, wish })
    }

    fn follow(&mut self, gateway: GatewayId, id: u128, forced: &[TokenId]) -> Vec<Effect> {
        self.event(Event::Submit { gateway, submit: submit(id, forced) })
    }

    fn say(&mut self, id: u128, index: u32) -> Vec<Effect> {
        let (cached_tokens, queue_ms) = (3, 4);
        let token =
            TokenEvent { id: choice(id), index, token: 100 + index, logprobs: None, cached_tokens, queue_ms };
        self.event(Event::Said(FromScheduler::Token(token)))
    }

    fn finish(&mut self, id: u128) -> Vec<Effect> {
        let reason = FinishReason::Stop;
        self.event(Event::Said(FromScheduler::Finished {
            id: choice(id),
            reason,
            receipt: Receipt::default(),
        }))
    }

    fn persisted(&mut self, id: u128, outcome: Result<(), String>) -> Vec<Effect> {
        self.event(Event::Persisted { id: RequestId(id), outcome })
    }

    fn stored(&mut self, id: u128) -> Result<ResponseRecord, AdminFailureKind> {
        let effects = self.call(ONE, ResponseCall::Get(RequestId(id)));
        match effects.first() {
            Some(Effect::Reply { reply: Ok(AdminReply::Response(record)), .. }) => Ok(record.clone()),
            Some(Effect::Reply { reply: Err(failure), .. }) => Err(failure.kind),
            other => panic!("{other:?}"),
        }
    }
}

/// Tokens that a gateway is told, in order.
fn told(effects: &[Effect], gateway: GatewayId) -> Vec<TokenId> {
    let of = |effect: &Effect| match effect {
        Effect::ToGateway(to, FromScheduler::Token(token)) if *to == gateway => vec![token.token],
        Effect::ToGateway(to, FromScheduler::Tokens(history)) if *to == gateway => {
            history.clone().into_events().map(|event| event.token).collect()
        }
        _ => Vec::new(),
    };
    effects.iter().flat_map(of).collect()
}

fn is_told_the_end(effects: &[Effect], gateway: GatewayId) -> bool {
    effects.iter().any(|effect| {
        matches!(effect, Effect::ToGateway(to, FromScheduler::Finished { .. } | FromScheduler::Failed { .. }) if *to == gateway)
    })
}

fn persists(effects: &[Effect]) -> Vec<(u128, bool)> {
    let of = |effect: &Effect| match effect {
        Effect::Persist { id, record } => Some((id.0, record.is_some())),
        _ => None,
    };
    effects.iter().filter_map(of).collect()
}

#[test]
fn whoever_comes_later_hears_everything_and_the_engine_computes_it_once() {
    let mut world = World::new();
    let begun = world.follow(ONE, 1, &[]);
    assert!(
        matches!(begun.as_slice(), [Effect::Submit(submit)] if submit.forced_logprobs.is_empty()),
        "{begun:?}"
    );
    let first = world.say(1, 0);
    assert_eq!((told(&first, ONE), told(&first, TWO)), (vec![100], vec![]));
    let joined = world.follow(TWO, 1, &[]);
    assert_eq!(told(&joined, TWO), [100]);
    assert!(!joined.iter().any(|effect| matches!(effect, Effect::Submit(_))), "computed twice: {joined:?}");
    let second = world.say(1, 1);
    assert_eq!((told(&second, ONE), told(&second, TWO)), (vec![101], vec![101]));
    // One that has heard the first comes back.
    world.event(Event::Unfollow { gateway: TWO, id: choice(1) });
    assert_eq!(told(&world.follow(TWO, 1, &[100]), TWO), [101]);
    let end = world.finish(1);
    assert!(is_told_the_end(&end, ONE) && is_told_the_end(&end, TWO));
    // After the end, too.
    let late = world.follow(ONE, 1, &[]);
    assert_eq!(told(&late, ONE), [100, 101]);
    assert!(is_told_the_end(&late, ONE));
}

#[test]
fn a_long_history_comes_in_parts_in_order() {
    let mut world = World::new();
    let forced: Vec<TokenId> = (0..1_500).collect();
    world.follow(ONE, 1, &forced);
    let joined = world.follow(TWO, 1, &[]);
    assert_eq!(told(&joined, TWO), forced);
    assert_eq!(joined.len(), 3, "in parts of at most 512");
}

#[test]
fn a_choice_that_nobody_follows_goes_on_for_its_grace_and_not_longer() {
    let mut world = World::new();
    world.follow(ONE, 1, &[]);
    world.event(Event::GatewayGone(ONE));
    assert_eq!(world.after(GRACE_MS - 1), []);
    assert!(world.core.keeps(choice(1)));
    world.say(1, 0);
    assert_eq!(told(&world.follow(TWO, 1, &[]), TWO), [100], "what was said meanwhile is there");
    world.event(Event::GatewayGone(TWO));
    assert_eq!(world.after(GRACE_MS), [Effect::Cancel(choice(1))]);
    assert!(!world.core.keeps(choice(1)));
    // Whoever comes now has it computed anew.
    assert!(matches!(world.follow(ONE, 1, &[]).as_slice(), [Effect::Submit(_)]));
}

#[test]
fn one_in_the_background_is_offered_until_somebody_takes_it_up() {
    let mut world = World::new();
    world.call(ONE, ResponseCall::Put(record(1, true)));
    world.persisted(1, Ok(()));
    world.follow(ONE, 1, &[]);
    assert_eq!(world.after(60_000), [], "somebody follows");
    world.event(Event::GatewayGone(ONE));
    world.after(100);
    let offered_to = |effects: &[Effect]| {
        let of = |effect: &Effect| match effect {
            Effect::ToGateway(gateway, FromScheduler::Adopt(record)) => Some((*gateway, record.id.0)),
            _ => None,
        };
        effects.iter().find_map(of)
    };
    assert_eq!(offered_to(&world.after(1_000)), Some((TWO, 1)));
    assert_eq!(offered_to(&world.after(1_000)), None, "it has some time");
    assert_eq!(offered_to(&world.after(5_000)), Some((TWO, 1)), "and is asked again");
    world.event(Event::GatewayGone(TWO));
    // Nobody is there for long: the computing stops, the response does not.
    assert!(world.after(GRACE_MS).contains(&Effect::Cancel(choice(1))));
    assert_eq!(world.stored(1).unwrap().outcome, None);
    world.event(Event::GatewayUp(GatewayId(3)));
    assert_eq!(offered_to(&world.after(100)), Some((GatewayId(3), 1)));
}

#[test]
fn one_whose_client_has_gone_is_cancelled_after_its_grace() {
    let mut world = World::new();
    world.call(ONE, ResponseCall::Put(record(1, false)));
    world.follow(ONE, 1, &[]);
    world.event(Event::GatewayGone(ONE));
    world.after(1);
    let over = world.after(GRACE_MS);
    assert!(over.contains(&Effect::Cancel(choice(1))));
    let outcome = world.stored(1).unwrap().outcome.unwrap();
    assert_eq!((outcome.status, outcome.answer), (ResponseStatus::Cancelled, None));
}

#[test]
fn what_has_ended_stays_as_it_is() {
    let mut world = World::new();
    world.call(ONE, ResponseCall::Put(record(1, false)));
    world.follow(ONE, 1, &[]);
    // A stop string: the gateway knows of the end first.
    let ended = world.call(ONE, ResponseCall::Put(answered(record(1, false), ResponseStatus::Completed)));
    assert!(ended.contains(&Effect::Cancel(choice(1))));
    for later in [record(1, false), answered(record(1, false), ResponseStatus::Failed)] {
        world.call(TWO, ResponseCall::Put(later));
        assert_eq!(world.stored(1).unwrap().outcome.unwrap().status, ResponseStatus::Completed);
    }
    world.call(ONE, ResponseCall::Cancel(RequestId(1)));
    assert_eq!(world.stored(1).unwrap().outcome.unwrap().status, ResponseStatus::Completed);
}

#[test]
fn cancelling_tells_followers_and_their_last_word_is_stored() {
    let mut world = World::new();
    world.call(ONE, ResponseCall::Put(record(1, true)));
    world.follow(ONE, 1, &[]);
    let cancelled = world.call(TWO, ResponseCall::Cancel(RequestId(1)));
    let is_cancelled = |effect: &Effect| {
        matches!(
            effect,
            Effect::ToGateway(
                ONE,
                FromScheduler::Failed { error: RequestFailure { kind: FailureKind::Cancelled, .. }, .. }
            )
        )
    };
    assert!(cancelled.iter().any(is_cancelled) && cancelled.contains(&Effect::Cancel(choice(1))));
    assert_eq!(world.stored(1).unwrap().outcome.unwrap().answer, None);
    world.call(ONE, ResponseCall::Put(answered(record(1, true), ResponseStatus::Cancelled)));
    assert_eq!(world.stored(1).unwrap().outcome.unwrap().answer, Some(blob(2)));
}

#[test]
fn what_is_deleted_does_not_come_back() {
    let mut world = World::new();
    world.call(ONE, ResponseCall::Put(record(1, true)));
    world.follow(ONE, 1, &[]);
    world.call(TWO, ResponseCall::Delete(RequestId(1)));
    world.call(ONE, ResponseCall::Put(answered(record(1, true), ResponseStatus::Completed)));
    assert_eq!(world.stored(1), Err(AdminFailureKind::NotFound));
    assert_eq!(persists(&world.persisted(1, Ok(()))), [(1, false)], "the store forgets it as well");
}

#[test]
fn the_store_gets_one_change_of_a_record_at_a_time_and_in_the_end_the_last() {
    let mut world = World::new();
    let begun = world.call(ONE, ResponseCall::Put(record(1, true)));
    assert_eq!(persists(&begun), [(1, true)]);
    assert_eq!(begun.len(), 1, "the caller waits: {begun:?}");
    let ended = world.call(ONE, ResponseCall::Put(answered(record(1, true), ResponseStatus::Completed)));
    assert_eq!(persists(&ended), []);
    let written = world.persisted(1, Ok(()));
    assert!(matches!(written[0], Effect::Reply { reply: Ok(AdminReply::Done), .. }));
    assert_eq!(persists(&written), [(1, true)]);
    // A store that is away delays, and loses nothing; nobody waits for it.
    let failed = world.persisted(1, Err("away".to_owned()));
    assert_eq!(persists(&failed), []);
    assert_eq!(persists(&world.after(999)), []);
    assert_eq!(persists(&world.after(1)), [(1, true)]);
    world.persisted(1, Ok(()));
    let begun = world.call(ONE, ResponseCall::Put(record(2, true)));
    assert_eq!(persists(&begun), [(2, true)]);
    let failed = world.persisted(2, Err("away".to_owned()));
    assert!(matches!(failed[0], Effect::Reply { reply: Ok(AdminReply::Done), .. }), "{failed:?}");
}

#[test]
fn the_oldest_that_have_ended_make_room_and_the_old_go() {
    let mut world = World::new();
    for id in 1..=4 {
        world.call(ONE, ResponseCall::Put(record(id, true)));
    }
    let full = world.call(ONE, ResponseCall::Put(record(5, true)));
    assert!(
        matches!(&full[0], Effect::Reply { reply: Err(failure), .. } if failure.kind == AdminFailureKind::Full)
    );
    for id in [3, 2] {
        world.call(ONE, ResponseCall::Put(answered(record(id, true), ResponseStatus::Completed)));
    }
    world.call(ONE, ResponseCall::Put(record(5, true)));
    assert_eq!(world.stored(2), Err(AdminFailureKind::NotFound));
    assert!(world.stored(3).is_ok());
    // Made at 1,003 and kept for 100 s; those in progress stay.
    world.event(Event::WallClock(1_103));
    assert!(world.stored(3).is_ok());
    world.event(Event::WallClock(1_200));
    assert_eq!(world.stored(3), Err(AdminFailureKind::NotFound));
    assert!(world.stored(1).is_ok());
}

#[test]
fn a_new_term_goes_on_with_what_was_stored() {
    let mut world = World::new();
    let done = answered(record(2, false), ResponseStatus::Completed);
    world.event(Event::Stored(vec![record(1, true), done.clone(), record(3, false)]));
    assert_eq!(world.stored(2), Ok(done));
    assert_eq!(world.core.referenced().filter(|id| *id == blob(2)).count(), 1);
    // Gateways come back by themselves; what they do not bring is offered.
    world.follow(ONE, 3, &[100, 101]);
    let offered = world.after(1_000);
    let adopt = |effect: &Effect| matches!(effect, Effect::ToGateway(_, FromScheduler::Adopt(record)) if record.id.0 == 1);
    assert_eq!(offered.iter().filter(|effect| adopt(effect)).count(), 1, "{offered:?}");
    assert_eq!(told(&world.follow(TWO, 3, &[]), TWO), [100, 101], "forced tokens are history, too");
}
