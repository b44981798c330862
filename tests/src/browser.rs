//! A real browser without a window: Chromium, driven through chromedriver by the WebDriver protocol, which is JSON over HTTP.

use crate::cluster::free_port;
use crate::{http, processes, until};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// A page that shows nothing new for so long will not.
pub const SIGHT_LIMIT: Duration = Duration::from_secs(30);
const START_LIMIT: Duration = Duration::from_secs(30);
/// The name under which WebDriver hands out elements.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";
const PROGRAMS: [&str; 2] = ["chromedriver", "chromium"];

/// Keys as WebDriver writes them.
pub mod keys {
    /// Goes to the next element.
    pub const TAB: &str = "\u{e004}";
    /// Presses a button, sends a message.
    pub const ENTER: &str = "\u{e007}";
    /// Closes a dialog.
    pub const ESCAPE: &str = "\u{e00c}";
    /// To the left.
    pub const LEFT: &str = "\u{e012}";
    /// To the right.
    pub const RIGHT: &str = "\u{e014}";
}

/// A running browser with one window. Dropping it closes it.
#[derive(Debug)]
pub struct Browser {
    driver: Child,
    /// Of chromedriver.
    address: String,
    /// Path of the session below it.
    session: String,
    /// What the browser writes, removed at the end.
    _profile: TempDir,
    screenshots: PathBuf,
}

impl Browser {
    /// A browser with a window of 1280 × 860 pixels. Where Chromium or its driver is not installed, says so and returns `None`: the test
    /// is to return.
    #[track_caller]
    pub fn start(test: &str) -> Option<Browser> {
        for program in PROGRAMS {
            let version =
                Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
            if !version.is_ok_and(|status| status.success()) {
                eprintln!(
                    "SKIPPED {test}: there is no {program} (Debian: apt install chromium chromium-driver)"
                );
                return None;
            }
        }
        let port = free_port();
        let driver = Command::new("chromedriver")
            .args([format!("--port={port}"), "--log-level=SEVERE".to_owned()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("chromedriver cannot be started");
        let profile = tempfile::Builder::new().prefix("ashlar-browser-").tempdir().expect("a directory");
        let mut browser = Browser {
            driver,
            address: format!("127.0.0.1:{port}"),
            session: String::new(),
            _profile: profile,
            screenshots: screenshots(),
        };
        let listens = || http::get(&browser.address, "/status").is_ok_and(|answer| answer.status == 200);
        assert!(until(START_LIMIT, || listens().then_some(())).is_some(), "chromedriver does not answer");
        let session = browser.ask("POST", "/session", &capabilities(browser._profile.path()));
        let id = session["sessionId"].as_str().expect("a session");
        browser.session = format!("/session/{id}");
        browser.resize(1280, 860, false);
        Some(browser)
    }

    /// Opens an address.
    #[track_caller]
    pub fn open(&self, url: &str) {
        self.command("/url", &json!({"url": url}));
    }

    /// Loads the page again.
    #[track_caller]
    pub fn reload(&self) {
        self.command("/refresh", &json!({}));
    }

    /// Empties a field and types into it.
    #[track_caller]
    pub fn fill(&self, css: &str, text: &str) {
        let element = self.element(css);
        self.command(&format!("/element/{element}/clear"), &json!({}));
        self.command(&format!("/element/{element}/value"), &json!({"text": text}));
    }

    /// Has the browser put what it downloads into a directory.
    #[track_caller]
    pub fn download_to(&self, directory: &Path) {
        self.devtools(
            "Browser.setDownloadBehavior",
            &json!({"behavior": "allow", "downloadPath": directory}),
        );
    }

    /// Runs a function body in the page, with `arguments`, and gives what it returns.
    #[track_caller]
    pub fn script(&self, body: &str, arguments: &[Value]) -> Value {
        self.command("/execute/sync", &json!({"script": body, "args": arguments}))
    }

    /// What a script without arguments returns.
    #[track_caller]
    pub fn eval(&self, expression: &str) -> Value {
        self.script(&format!("return {expression}"), &[])
    }

    /// Waits until an expression holds in the page.
    #[track_caller]
    pub fn await_that(&self, expression: &str) {
        self.await_within(SIGHT_LIMIT, expression);
    }

    /// The same with a limit of its own.
    #[track_caller]
    pub fn await_within(&self, limit: Duration, expression: &str) {
        if until(limit, || (self.eval(&format!("Boolean({expression})")) == true).then_some(())).is_none() {
            let text = self.eval("document.body.innerText");
            self.screenshot("failed");
            panic!(
                "not within {limit:?}: {expression}\nThe page says:\n{}",
                text.as_str().unwrap_or_default()
            );
        }
    }

    /// Waits until the page's text has this in it.
    #[track_caller]
    pub fn await_text(&self, text: &str) {
        self.await_that(&format!("document.body.innerText.includes({})", json!(text)));
    }

    /// Presses the first element that is there and seen.
    #[track_caller]
    pub fn click(&self, css: &str) {
        let element = self.element(css);
        self.command(&format!("/element/{element}/click"), &json!({}));
    }

    /// Presses the button, link or label that says this.
    #[track_caller]
    pub fn press(&self, text: &str) {
        // In the middle of the window nothing that stays there lies over it.
        let find = "const found = [...document.querySelectorAll('dialog[open] button, button, a, label')].find(\
                    (one) => one.textContent.trim() === arguments[0] && one.checkVisibility());\
                    found?.scrollIntoView({block: 'center'}); return found";
        let found =
            until(SIGHT_LIMIT, || self.script(find, &[json!(text)])[ELEMENT].as_str().map(ToOwned::to_owned));
        let element = found.unwrap_or_else(|| panic!("nothing to press says {text:?}"));
        self.command(&format!("/element/{element}/click"), &json!({}));
    }

    /// Types into an element; a file's input takes its path.
    #[track_caller]
    pub fn type_into(&self, css: &str, text: &str) {
        let element = self.element(css);
        self.command(&format!("/element/{element}/value"), &json!({"text": text}));
    }

    /// Chooses an option of a `select` by the beginning of its text.
    #[track_caller]
    pub fn choose(&self, css: &str, text: &str) {
        let choose = "const select = document.querySelector(arguments[0]);\
                      const option = [...select.options].find((one) => one.text.startsWith(arguments[1]));\
                      if (!option) return false; select.value = option.value;\
                      select.dispatchEvent(new Event('change', {bubbles: true})); return true;";
        let chosen =
            until(SIGHT_LIMIT, || (self.script(choose, &[json!(css), json!(text)]) == true).then_some(()));
        assert!(chosen.is_some(), "{css} has no option {text:?}");
    }

    /// Presses keys, one after the other, wherever the focus is.
    #[track_caller]
    pub fn keys(&self, keys: &[&str]) {
        let strokes: Vec<Value> = keys
            .iter()
            .flat_map(|key| {
                [json!({"type": "keyDown", "value": key}), json!({"type": "keyUp", "value": key})]
            })
            .collect();
        let actions = json!({"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]});
        self.command("/actions", &actions);
    }

    /// Gives the window this size, as a phone has it if `mobile`.
    #[track_caller]
    pub fn resize(&self, width: u32, height: u32, mobile: bool) {
        let metrics = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile});
        self.devtools("Emulation.setDeviceMetricsOverride", &metrics);
    }

    /// Has the system prefer `light` or `dark`.
    #[track_caller]
    pub fn prefer(&self, scheme: &str) {
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.devtools("Emulation.setEmulatedMedia", &json!({"features": features}));
    }

    /// Errors that the page has written to its console since it was last asked.
    #[track_caller]
    pub fn console_errors(&self) -> Vec<String> {
        let entries = self.command("/se/log", &json!({"type": "browser"}));
        let entries = entries.as_array().map(Vec::as_slice).unwrap_or_default();
        let severe = entries.iter().filter(|entry| entry["level"] == "SEVERE");
        let told = severe.filter_map(|entry| entry["message"].as_str());
        // The machine got or lost a network, as when containers start on it: every request under way ends so.
        told.filter(|message| !message.contains("ERR_NETWORK_CHANGED")).map(ToOwned::to_owned).collect()
    }

    /// Keeps what is seen as `NAME.png`, in the directory `ASHLAR_SCREENSHOTS` or `dashboard` beside the build's own files.
    #[track_caller]
    pub fn screenshot(&self, name: &str) {
        let picture = self.ask("GET", &format!("{}/screenshot", self.session), &Value::Null);
        let bytes = base64(picture.as_str().expect("a picture"));
        fs::create_dir_all(&self.screenshots).expect("a directory for screenshots");
        fs::write(self.screenshots.join(format!("{name}.png")), bytes).expect("a screenshot");
    }

    #[track_caller]
    fn devtools(&self, command: &str, parameters: &Value) {
        self.command("/goog/cdp/execute", &json!({"cmd": command, "params": parameters}));
    }

    /// The id of the first element of a selector, once it is there.
    #[track_caller]
    fn element(&self, css: &str) -> String {
        let found = until(SIGHT_LIMIT, || {
            let element = self.script("return document.querySelector(arguments[0])", &[json!(css)]);
            element[ELEMENT].as_str().map(ToOwned::to_owned)
        });
        found.unwrap_or_else(|| panic!("there is no {css}"))
    }

    #[track_caller]
    fn command(&self, path: &str, body: &Value) -> Value {
        self.ask("POST", &format!("{}{path}", self.session), body)
    }

    #[track_caller]
    fn ask(&self, method: &str, path: &str, body: &Value) -> Value {
        let answer = match method {
            "POST" => http::post(&self.address, path, body.to_string().as_bytes()),
            _ => http::raw(&self.address, self.head(method, path).as_bytes()),
        };
        let answer = answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        let mut said = answer.json();
        assert_eq!(answer.status, 200, "{method} {path} {body}: {}", said["value"]["message"]);
        said["value"].take()
    }

    fn head(&self, method: &str, path: &str) -> String {
        format!("{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", self.address)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.session.is_empty() {
            let picture = http::raw(
                &self.address,
                self.head("GET", &format!("{}/screenshot", self.session)).as_bytes(),
            );
            if let Ok(answer) = picture
                && let Some(text) = answer.json()["value"].as_str()
                && fs::create_dir_all(&self.screenshots).is_ok()
            {
                let _ = fs::write(self.screenshots.join("at-the-panic.png"), base64(text));
            }
        }
        let browsers = processes::children(self.driver.id());
        let _ = http::raw(&self.address, self.head("DELETE", &self.session).as_bytes());
        let _ = self.driver.kill();
        let _ = self.driver.wait();
        for browser in browsers {
            processes::signal(browser, "KILL");
        }
    }
}

fn capabilities(profile: &Path) -> Value {
    let profile = format!("--user-data-dir={}", profile.display());
    let arguments = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1280,860",
        &profile,
    ];
    let chrome = json!({"args": arguments});
    let always = json!({
        "browserName": "chrome", "goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"},
    });
    json!({"capabilities": {"alwaysMatch": always}})
}

fn screenshots() -> PathBuf {
    if let Some(directory) = std::env::var_os("ASHLAR_SCREENSHOTS") {
        return PathBuf::from(directory);
    }
    // Tests run from `target/PROFILE/deps`.
    let own = std::env::current_exe().unwrap_or_default();
    own.ancestors().nth(3).unwrap_or(Path::new("target")).join("tmp/dashboard")
}

/// The bytes of a text in base64, as drivers send pictures. What is no digit of it (line ends, padding) is passed over.
fn base64(text: &str) -> Vec<u8> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let (mut bytes, mut bits, mut held) = (Vec::with_capacity(text.len() / 4 * 3), 0_u32, 0);
    for digit in text.bytes().filter_map(digit) {
        bits = (bits << 6) | u32::from(digit);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_is_read_with_and_without_padding() {
        assert_eq!(base64("QXNobGFy"), b"Ashlar");
        assert_eq!(base64("c3RvbmU="), b"stone");
        assert_eq!(base64("Yg=="), b"b");
    }
}
