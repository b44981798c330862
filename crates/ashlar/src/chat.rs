//! `ashlar chat`: a conversation in the terminal, streamed.

use crate::http::{Client, GatewayArgs};
use crate::roles;
use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};
use std::io::{BufRead, IsTerminal, Write};

/// Arguments of `ashlar chat`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar chat                                 the cluster that `ashlar up` started
  ashlar chat --url http://10.0.0.5:8080      another one
  echo 'What is 12 + 34?' | ashlar chat       one question, one answer
In a conversation: /reset forgets it, /quit ends it.")]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    gateway: GatewayArgs,
    /// Model to ask; default: the first that is served.
    #[arg(long)]
    model: Option<String>,
    /// A system message.
    #[arg(long)]
    system: Option<String>,
    /// Sampling temperature; 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Longest answer in tokens.
    #[arg(long)]
    max_tokens: Option<u32>,
}

pub(crate) fn run(args: ChatArgs) -> Result<()> {
    roles::runtime()?.block_on(converse(args))
}

async fn converse(args: ChatArgs) -> Result<()> {
    let client = args.gateway.client()?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => first_model(&client).await?,
    };
    let terminal = std::io::stdin().is_terminal();
    let system = || -> Vec<Value> {
        args.system.iter().map(|text| json!({"role": "system", "content": text})).collect()
    };
    let mut messages = system();
    if terminal {
        println!("{model} — /reset forgets the conversation, /quit ends it");
    }
    loop {
        if terminal {
            print!("\n> ");
            std::io::stdout().flush()?;
        }
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line)? == 0 {
            return Ok(());
        }
        match line.trim() {
            "" => continue,
            "/quit" | "/exit" => return Ok(()),
            "/reset" => {
                messages = system();
                continue;
            }
            text => messages.push(json!({"role": "user", "content": text})),
        }
        let first = usize::from(args.system.is_some());
        let answered = loop {
            match answer(&client, &args, &model, &messages).await {
                Err(error)
                    if error.to_string().contains("maximum context length") && messages.len() > first + 2 =>
                {
                    messages.drain(first..first + 2);
                    if terminal {
                        eprintln!("(the context is full: the oldest question is forgotten)");
                    }
                }
                other => break other,
            }
        };
        match answered {
            Ok(text) => messages.push(json!({"role": "assistant", "content": text})),
            Err(error) if terminal => {
                eprintln!("error: {error:#}");
                messages.pop();
            }
            Err(error) => return Err(error),
        }
    }
}

async fn first_model(client: &Client) -> Result<String> {
    let (status, models) = client.get("/v1/models").await?;
    match models["data"][0]["id"].as_str() {
        Some(id) => Ok(id.to_owned()),
        None => bail!("the gateway lists no model (status {status})"),
    }
}

/// Streams one answer to standard output and returns it.
async fn answer(client: &Client, args: &ChatArgs, model: &str, messages: &[Value]) -> Result<String> {
    let mut body = json!({
        "model": model, "messages": messages, "stream": true, "temperature": args.temperature,
    });
    if let Some(max_tokens) = args.max_tokens {
        body["max_tokens"] = json!(max_tokens);
    }
    let mut events = client.stream("/v1/chat/completions", &body).await?;
    let mut text = String::new();
    while let Some(event) = events.next().await? {
        let choice = &event["choices"][0];
        if let Some(thought) = choice["delta"]["reasoning_content"].as_str()
            && std::io::stderr().is_terminal()
        {
            eprint!("\x1b[2m{thought}\x1b[0m");
        }
        if let Some(delta) = choice["delta"]["content"].as_str() {
            text.push_str(delta);
            print!("{delta}");
            std::io::stdout().flush()?;
        }
        if choice["finish_reason"] == "length" {
            eprint!(" [cut: the answer has reached its greatest length]");
        }
    }
    println!();
    Ok(text)
}
