//! `tools`, `tool_choice` and `parallel_tool_calls`.

use super::error::ApiError;
use super::fields::Fields;
use crate::config::GatewayConfig;
use serde_json::Value;

const NAME_CHARS_MAX: usize = 64;

/// The tools of a request and whether they must be used.
#[derive(Debug, Default)]
pub(crate) struct Tools {
    /// As the client sent them; `None` when there are none, or they must not be used.
    pub(crate) offered: Option<Value>,
    pub(crate) choice: ToolChoice,
    pub(crate) parallel: bool,
}

/// Whether the model has to call a tool.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// It cannot.
    #[default]
    None,
    /// It may.
    Auto,
    /// It must call one, whichever.
    Required,
    /// It must call this one.
    Function(String),
}

pub(crate) fn take_tools(fields: &mut Fields, config: &GatewayConfig) -> Result<Tools, ApiError> {
    let list = fields.array("tools")?.unwrap_or_default();
    let choice = fields.take("tool_choice");
    let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
    if list.len() > config.tools_max {
        let message = format!("`tools` may hold at most {}, not {}", config.tools_max, list.len());
        return Err(ApiError::field("tools", message));
    }
    let mut names = Vec::with_capacity(list.len());
    for (index, tool) in list.iter().enumerate() {
        let tool = Fields::of(tool.clone(), &format!("tools[{index}]"))?;
        names.push(check_tool(tool, fields)?);
    }
    let choice = tool_choice(choice, &names, fields)?;
    let offered = (choice != ToolChoice::None).then_some(Value::Array(list));
    Ok(Tools { offered, choice, parallel })
}

/// Checks a tool and returns its function's name.
fn check_tool(mut tool: Fields, request: &mut Fields) -> Result<String, ApiError> {
    match tool.string("type")?.as_deref() {
        None | Some("function") => {}
        Some(_) => {
            let path = tool.path("type");
            return Err(ApiError::field(&path, format!("`{path}` must be \"function\"")));
        }
    }
    let mut function = tool.object("function")?.ok_or_else(|| tool.required("function"))?;
    let name = function.string("name")?.ok_or_else(|| function.required("name"))?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if name.is_empty() || name.len() > NAME_CHARS_MAX || !name.chars().all(allowed) {
        let path = function.path("name");
        let message = format!("`{path}` must be 1 to {NAME_CHARS_MAX} letters, digits, `_`, `-` or `.`");
        return Err(ApiError::field(&path, message));
    }
    function.string("description")?;
    function.bool("strict")?;
    match function.take("parameters") {
        None | Some(Value::Object(_)) => {}
        Some(other) => return Err(function.mistyped("parameters", "an object (a JSON schema)", &other)),
    }
    tool.finish(function);
    request.finish(tool);
    Ok(name)
}

fn tool_choice(
    choice: Option<Value>,
    names: &[String],
    request: &mut Fields,
) -> Result<ToolChoice, ApiError> {
    const PARAM: &str = "tool_choice";
    let choice = match choice {
        None if names.is_empty() => ToolChoice::None,
        None => ToolChoice::Auto,
        Some(Value::String(word)) => match word.as_str() {
            "none" => ToolChoice::None,
            "auto" if names.is_empty() => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            _ => {
                return Err(ApiError::field(
                    PARAM,
                    "`tool_choice` must be none, auto, required or a function",
                ));
            }
        },
        Some(value) => {
            let mut named = Fields::of(value, PARAM)?;
            let kind = named.string("type")?;
            if kind.as_deref() != Some("function") {
                return Err(ApiError::field(PARAM, "`tool_choice.type` must be \"function\""));
            }
            let mut function = named.object("function")?.ok_or_else(|| named.required("function"))?;
            let name = function.string("name")?.ok_or_else(|| function.required("name"))?;
            if !names.contains(&name) {
                let shown: String = name.chars().take(NAME_CHARS_MAX).collect();
                let message =
                    format!("`tool_choice` names `{shown}`, which is not among `tools`: add it there");
                return Err(ApiError::field(PARAM, message));
            }
            named.finish(function);
            request.finish(named);
            ToolChoice::Function(name)
        }
    };
    if choice == ToolChoice::Required && names.is_empty() {
        return Err(ApiError::field(
            PARAM,
            "`tool_choice` is \"required\" but there are no `tools`: add some",
        ));
    }
    Ok(choice)
}
