//! Who is let in, to what, and what they see of others.

use crate::scheduler::{Action, say};
use crate::world::{PLAIN_TEMPLATE, World, ask};
use ashlar_identity::ApiKey;
use ashlar_protocol::access::{KeyLimits, KeyRecord, Quota, QuotaLine, Scope};
use ashlar_protocol::admin::AdapterView;
use ashlar_protocol::serving::FailureKind;
use ashlar_vocabulary::{AdapterId, BlobId, Tenant};
use hyper::Request;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// What shows nothing of anybody.
const PUBLIC: [&str; 7] =
    ["/", "/dashboard/{file}", "/docs", "/docs/{file}", "/health", "/openapi.json", "/ready"];

struct Key {
    secret: ApiKey,
    record: KeyRecord,
}

fn key(tenant: &str, scopes: &[Scope]) -> Key {
    let secret = ApiKey::generate().unwrap();
    let record = KeyRecord {
        id: secret.id(),
        hash: secret.hash(),
        name: format!("{tenant}'s"),
        tenant: Tenant(tenant.into()),
        scopes: scopes.to_vec(),
        models: None,
        adapters: None,
        limits: KeyLimits::default(),
        shares_prefixes: false,
        created_at: 7,
        expires_at: None,
        configured: false,
    };
    Key { secret, record }
}

impl Key {
    fn on(&self, request: hyper::http::request::Builder) -> hyper::http::request::Builder {
        request.header("authorization", format!("Bearer {}", self.secret.reveal()))
    }
}

/// A gateway that asks for keys, of which these are let in.
async fn world(keys: &[&Key]) -> World {
    let world =
        World::with(PLAIN_TEMPLATE, |config| config.keys_required = Some(true), |_| say("hello")).await;
    told(&world, keys).await;
    world
}

async fn told(world: &World, keys: &[&Key]) {
    world.scheduler.tell_keys(keys.iter().map(|key| key.record.clone()).collect()).await;
    let Some(last) = keys.last() else { return };
    while world.http.send(last.on(Request::get("/v1/models")), Vec::new()).await.status != 200 {
        tokio::task::yield_now().await;
    }
}

/// Path, method, scopes of every operation; no scope at all for what is open to any key, `None` for what is open to everybody.
async fn operations(world: &World) -> Vec<(String, String, Option<Vec<String>>)> {
    let reference = world.http.get("/openapi.json").await.json();
    let mut all = Vec::new();
    for (path, methods) in reference["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let scopes = operation["x-scopes"].as_array().into_iter().flatten();
            let scopes = scopes.map(|scope| scope.as_str().unwrap().to_owned()).collect();
            let is_public = operation["security"] == json!([]);
            all.push((path.clone(), method.to_uppercase(), (!is_public).then_some(scopes)));
        }
    }
    all
}

fn request(path: &str, method: &str) -> hyper::http::request::Builder {
    let parts = path.split('/').map(|part| if part.starts_with('{') { "x" } else { part });
    Request::builder().method(method).uri(parts.collect::<Vec<_>>().join("/"))
}

#[tokio::test]
async fn every_route_asks_for_a_key_but_those_that_show_nothing() {
    let world = world(&[]).await;
    let operations = operations(&world).await;
    let public: BTreeSet<&str> =
        operations.iter().filter(|(.., scopes)| scopes.is_none()).map(|(path, ..)| path.as_str()).collect();
    assert_eq!(public, BTreeSet::from(PUBLIC));
    let stranger = key("stranger", &Scope::ALL);
    for (path, method, scopes) in &operations {
        let without = world.http.send(request(path, method), Vec::new()).await;
        let with_a_wrong_one = world.http.send(stranger.on(request(path, method)), Vec::new()).await;
        let with_another = request(path, method).header("authorization", "Bearer sk-anything");
        let with_another = world.http.send(with_another, Vec::new()).await;
        for answer in [without, with_a_wrong_one, with_another] {
            assert_eq!(answer.status == 401, scopes.is_some(), "{method} {path}: {}", answer.text());
            if answer.status == 401 {
                assert_eq!(answer.headers["www-authenticate"], "Bearer");
                assert_eq!(answer.json()["error"]["type"], "authentication_error");
            }
        }
        // A method that nobody has described is not open either.
        let other = world.http.send(request(path, "PUT"), Vec::new()).await;
        assert_eq!(other.status, 401, "PUT {path}");
    }
    assert!(world.scheduler.submits().is_empty() && world.scheduler.tenants().is_empty());
}

#[tokio::test]
async fn a_key_opens_what_its_scopes_say_and_nothing_else() {
    let keys = Scope::ALL.map(|scope| key("blue", &[scope]));
    let world = world(&keys.each_ref()).await;
    for (path, method, wanted) in operations(&world).await {
        let Some(wanted) = wanted else { continue };
        for (scope, key) in Scope::ALL.iter().zip(&keys) {
            let answer = world.http.send(key.on(request(&path, &method)), Vec::new()).await;
            let is_open = wanted.is_empty() || wanted.iter().any(|name| name == scope.name());
            assert_ne!(answer.status, 401, "{method} {path}");
            assert_eq!(answer.status != 403, is_open, "{method} {path} with {scope}: {}", answer.text());
        }
    }
}

#[tokio::test]
async fn a_key_is_shown_once_and_is_good_until_it_is_revoked() {
    let admin = key("operator", &[Scope::Admin]);
    let world = world(&[&admin]).await;
    let body =
        json!({"name": "notebooks", "tenant": "research", "requests_per_minute": 60, "kv_share_percent": 25});
    let made = world.http.send(admin.on(Request::post("/admin/keys")), body.to_string().into_bytes()).await;
    assert_eq!(made.status, 200, "{}", made.text());
    let made = made.json();
    let (id, secret) = (made["id"].as_str().unwrap(), made["key"].as_str().unwrap());
    assert!(secret.starts_with(&format!("ash_{id}_")));
    assert_eq!(
        (&made["scopes"], &made["tenant"], &made["requests_per_minute"], &made["kv_share_percent"]),
        (&json!(["inference"]), &json!("research"), &json!(60), &json!(25))
    );

    let list = world.http.send(admin.on(Request::get("/admin/keys")), Vec::new()).await;
    assert_eq!(list.json()["data"].as_array().unwrap().len(), 2);
    let hidden = secret.rsplit('_').next().unwrap();
    assert!(!list.text().contains(hidden));

    let chat = || Request::post("/v1/chat/completions").header("authorization", format!("Bearer {secret}"));
    let body = || ask(json!({})).to_string().into_bytes();
    assert_eq!(world.http.send(chat(), body()).await.status, 200);
    let revoke = admin.on(Request::delete(format!("/admin/keys/{id}")));
    assert_eq!(world.http.send(revoke, Vec::new()).await.status, 200);
    assert_eq!(world.http.send(chat(), body()).await.status, 401);
    for unknown in [id, "nonsense", "../x"] {
        let revoke = admin.on(Request::delete(format!("/admin/keys/{}", unknown.replace('/', "%2F"))));
        assert_eq!(world.http.send(revoke, Vec::new()).await.status, 404, "{unknown}");
    }
}

#[tokio::test]
async fn what_a_key_cannot_be_is_said_field_by_field() {
    let admin = key("operator", &[Scope::Admin]);
    let world = world(&[&admin]).await;
    let wrong = [
        ("name", json!({})),
        ("name", json!({"name": "x".repeat(200)})),
        ("tenant", json!({"name": "a", "tenant": "a b"})),
        ("tenant", json!({"name": "a", "tenant": ""})),
        ("scopes", json!({"name": "a", "scopes": []})),
        ("scopes", json!({"name": "a", "scopes": ["everything"]})),
        ("models", json!({"name": "a", "models": [1]})),
        ("adapters", json!({"name": "a", "adapters": vec!["x"; 65]})),
        ("requests_per_minute", json!({"name": "a", "requests_per_minute": 0})),
        ("tokens_per_minute", json!({"name": "a", "tokens_per_minute": 1u64 << 32})),
        ("kv_share_percent", json!({"name": "a", "kv_share_percent": 101})),
        ("expires_in_s", json!({"name": "a", "expires_in_s": -1})),
    ];
    for (field, body) in wrong {
        let request = admin.on(Request::post("/admin/keys"));
        let answer = world.http.send(request, body.to_string().into_bytes()).await;
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!(field)), "{body}");
    }
}

#[tokio::test]
async fn requests_are_on_the_account_of_their_key_and_prefixes_are_its_tenants() {
    let mut sharing = key("green", &[Scope::Inference]);
    sharing.record.shares_prefixes = true;
    let (blue, same, red) =
        (key("blue", &[Scope::Inference]), key("blue", &[Scope::Inference]), key("red", &[Scope::Inference]));
    let world = world(&[&blue, &same, &red, &sharing]).await;
    for key in [&blue, &same, &red, &sharing] {
        let body = ask(json!({"n": 2})).to_string().into_bytes();
        let answer = world.http.send(key.on(Request::post("/v1/chat/completions")), body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let submits = world.scheduler.submits();
    let salts: Vec<u64> = submits.iter().step_by(2).map(|submit| submit.tenant_salt).collect();
    assert_eq!(salts[0], salts[1]);
    assert_ne!(salts[0], salts[2]);
    assert!(salts[0] != 0 && salts[2] != 0 && salts[3] == 0);
    let charges: Vec<_> = submits[..2].iter().map(|submit| submit.charge.unwrap()).collect();
    assert!(charges.iter().all(|charge| charge.key == blue.record.id && !charge.resumed));
    let prompt = submits[0].prompt.len() as u32;
    assert_eq!((charges[0].requests, charges[0].prompt_tokens), (1, prompt));
    assert_eq!((charges[1].requests, charges[1].prompt_tokens), (0, 0), "a prompt is paid for once");
}

#[tokio::test]
async fn a_request_gives_way_as_it_likes_and_goes_before_others_only_where_its_key_does() {
    let (plain, mut urgent) = (key("blue", &[Scope::Inference]), key("red", &[Scope::Inference]));
    urgent.record.limits.priority = -5;
    let world = world(&[&plain, &urgent]).await;
    for (key, asked) in
        [(&plain, 0), (&plain, 3), (&plain, i32::MIN), (&urgent, 0), (&urgent, 7), (&urgent, -9)]
    {
        let body = ask(json!({"priority": asked})).to_string().into_bytes();
        let answer = world.http.send(key.on(Request::post("/v1/chat/completions")), body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let priorities: Vec<i32> = world.scheduler.submits().iter().map(|submit| submit.priority).collect();
    assert_eq!(priorities, [0, 3, 0, -5, 2, -5]);
}

#[tokio::test]
async fn who_is_turned_away_is_counted() {
    let (blue, admin) = (key("blue", &[Scope::Inference]), key("operator", &[Scope::Metrics]));
    let world = world(&[&blue, &admin]).await;
    let stranger = key("stranger", &[Scope::Admin]);
    let status = async |request| world.http.send(request, Vec::new()).await.status;
    assert_eq!(status(stranger.on(Request::get("/v1/models"))).await, 401);
    assert_eq!(status(Request::get("/v1/models")).await, 401);
    assert_eq!(status(blue.on(Request::get("/admin/keys"))).await, 403);
    let page = world.http.send(admin.on(Request::get("/metrics")), Vec::new()).await.text();
    let count = |status: u32| {
        let line = page
            .lines()
            .find(|line| line.starts_with("ashlar_turned_away_total") && line.contains(&status.to_string()));
        line.and_then(|line| line.rsplit(' ').next()).unwrap().parse::<u32>().unwrap()
    };
    // Waiting until keys were known may have been turned away, too.
    assert!(count(401) >= 2, "{page}");
    assert_eq!(count(403), 1, "{page}");
}

#[tokio::test]
async fn calls_are_for_the_keys_tenant_and_an_administrator_sees_all() {
    let (blue, admin) = (key("blue", &[Scope::Training]), key("operator", &Scope::ALL));
    let world = World::tuning().await;
    told(&world, &[&blue, &admin]).await;
    for key in [&blue, &admin] {
        let answer = world.http.send(key.on(Request::get("/v1/files")), Vec::new()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert_eq!(world.http.get("/v1/files").await.status, 200);
    assert_eq!(world.scheduler.tenants(), [Some(Tenant("blue".into())), None, None]);
}

#[tokio::test]
async fn adapters_and_models_of_others_are_not_there() {
    let (mut blue, red) = (key("blue", &[Scope::Inference]), key("red", &[Scope::Inference]));
    blue.record.adapters = Some(vec!["shared-1".into()]);
    let mut narrow = key("narrow", &[Scope::Inference]);
    narrow.record.models = Some(vec!["another".into()]);
    let world = world(&[&blue, &red, &narrow]).await;
    world.scheduler.change_cluster(|cluster| {
        let view = |name: &str, adapter, owner: Option<&str>| AdapterView {
            name: name.into(),
            generation: 1,
            adapter: AdapterId(BlobId([adapter; 32])),
            root: "x".into(),
            created_at: 1,
            owner: owner.map(|owner| Tenant(owner.into())),
        };
        cluster.adapters = vec![
            view("blues", 1, Some("blue")),
            view("reds", 2, Some("red")),
            view("shared-1", 3, None),
            view("shared-2", 4, None),
        ];
    });
    let names = async |key: &Key| {
        let list: Value = world.http.send(key.on(Request::get("/v1/models")), Vec::new()).await.json();
        let names =
            list["data"].as_array().unwrap().iter().map(|card| card["id"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    while names(&red).await.len() < 5 {
        tokio::task::yield_now().await;
    }
    assert_eq!(names(&blue).await, ["tiny", "alias", "blues", "shared-1"]);
    assert_eq!(names(&red).await, ["tiny", "alias", "reds", "shared-1", "shared-2"]);
    assert_eq!(names(&narrow).await, ["shared-1", "shared-2"]);
    let asks = async |key: &Key, model: &str| {
        let body = ask(json!({"model": model})).to_string().into_bytes();
        world.http.send(key.on(Request::post("/v1/chat/completions")), body).await
    };
    assert_eq!(asks(&blue, "blues").await.status, 200);
    let (foreign, unknown) = (asks(&blue, "reds").await, asks(&blue, "nobodys").await);
    assert_eq!((foreign.status, unknown.status), (404, 404));
    assert_eq!(foreign.text().replace("reds", "x"), unknown.text().replace("nobodys", "x"));
    assert_eq!(asks(&narrow, "tiny").await.status, 404);
    assert_eq!(world.http.send(blue.on(Request::get("/v1/models/reds")), Vec::new()).await.status, 404);
}

#[tokio::test]
async fn what_is_left_of_limits_is_in_the_head_of_answers_and_refusals() {
    let blue = key("blue", &[Scope::Inference]);
    let quota = |remaining| Quota {
        requests: Some(QuotaLine { limit: 2, remaining, reset_ms: 30_000 }),
        tokens: None,
    };
    let world = World::with(
        PLAIN_TEMPLATE,
        |config| config.keys_required = Some(true),
        move |submit| match submit.prompt.len() < 40 {
            true => [vec![Action::Quota(quota(1))], say("hello")].concat(),
            false => vec![Action::Quota(quota(0)), Action::Fail(FailureKind::RateLimited, "too often")],
        },
    )
    .await;
    told(&world, &[&blue]).await;
    for stream in [false, true] {
        let chat = || blue.on(Request::post("/v1/chat/completions"));
        let body = ask(json!({"stream": stream})).to_string().into_bytes();
        let answer = world.http.send(chat(), body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.headers["x-ratelimit-limit-requests"], "2");
        assert_eq!(answer.headers["x-ratelimit-remaining-requests"], "1");
        assert_eq!(answer.headers["x-ratelimit-reset-requests"], "30000ms");
        assert!(!answer.headers.contains_key("x-ratelimit-limit-tokens"));

        let long = json!({"stream": stream, "messages": [{"role": "user", "content": "x".repeat(100)}]});
        let refused = world.http.send(chat(), ask(long).to_string().into_bytes()).await;
        assert_eq!((refused.status, &refused.json()["error"]["code"]), (429, &json!("rate_limit_exceeded")));
        assert_eq!(refused.headers["x-ratelimit-remaining-requests"], "0");
        assert!(refused.headers.contains_key("retry-after"));
    }
}

#[tokio::test]
async fn who_has_changed_something_is_written_down_without_the_key() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("logs/audit.jsonl");
    let admin = key("operator", &[Scope::Admin]);
    let audit = path.clone();
    let configure = move |config: &mut ashlar_gateway::GatewayConfig| {
        (config.keys_required, config.audit_log) = (Some(true), Some(audit));
    };
    let world = World::with(PLAIN_TEMPLATE, configure, |_| say("x")).await;
    told(&world, &[&admin]).await;
    let body = json!({"name": "secret-name"}).to_string().into_bytes();
    let made = world.http.send(admin.on(Request::post("/admin/keys")), body).await;
    assert_eq!(made.status, 200);
    let refused = world.http.send(admin.on(Request::delete("/admin/keys/0")), Vec::new()).await;
    assert_eq!(refused.status, 404);
    world.http.send(admin.on(Request::get("/admin/keys")), Vec::new()).await;
    world.http.send(Request::post("/admin/keys"), Vec::new()).await;

    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let shown: Vec<_> = lines.iter().map(|line| (&line["method"], &line["path"], &line["status"])).collect();
    assert_eq!(
        shown,
        [
            (&json!("POST"), &json!("/admin/keys"), &json!(200)),
            (&json!("DELETE"), &json!("/admin/keys/0"), &json!(404)),
        ]
    );
    assert!(
        lines.iter().all(|line| line["key"] == admin.record.id.to_string() && line["tenant"] == "operator")
    );
    for secret in [admin.secret.reveal(), made.json()["key"].as_str().unwrap(), "secret-name"] {
        assert!(!text.contains(secret.rsplit('_').next().unwrap()), "{text}");
    }
}
