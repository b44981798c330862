//! The reference as an OpenAPI 3.1 document.

use super::{Answer, Body, Field, Kind, Operation, Parameter, Place};
use crate::access::Access;
use serde_json::{Map, Value, json};

/// The document of these operations, each with its path.
pub(crate) fn document<'a>(operations: impl Iterator<Item = (&'a str, &'a Operation)>) -> Value {
    let mut paths = Map::new();
    for (path, operation) in operations {
        // Axum's rest of a path is a parameter as any other.
        let path = path.replace("{*", "{");
        let methods = paths.entry(path).or_insert_with(|| json!({}));
        methods[operation.verb.name()] = operation_json(operation);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Ashlar",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Serving, fine-tuning and operating one cluster. Inference, files and fine-tuning are OpenAI's API: its \
                clients work unchanged.",
        },
        "paths": paths,
        "components": {
            "schemas": {"Error": error_schema()},
            "securitySchemes": {"key": {
                "type": "http",
                "scheme": "bearer",
                "description": "An API key, where the server asks for one.",
            }},
        },
    })
}

fn operation_json(operation: &Operation) -> Value {
    let mut value = json!({
        "tags": [operation.subject],
        "summary": operation.summary,
        "responses": {
            "200": answer_json(operation.answer),
            "default": {
                "description": "What went wrong, and what to do.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    });
    let scopes = operation.access.scopes();
    value["security"] = match operation.access {
        Access::Public => json!([]),
        _ => json!([{"key": []}]),
    };
    if !scopes.is_empty() {
        value["x-scopes"] = scopes.iter().map(|scope| scope.name()).collect();
    }
    if !operation.details.is_empty() {
        value["description"] = operation.details.into();
    }
    if !operation.parameters.is_empty() {
        value["parameters"] = operation.parameters.iter().map(parameter_json).collect();
    }
    let content = match &operation.body {
        Body::None => return value,
        Body::Json(lists) => {
            json!({"application/json": {"schema": object_schema(lists.iter().copied().flatten())}})
        }
        Body::Multipart(fields) => {
            json!({"multipart/form-data": {"schema": object_schema(fields.iter())}})
        }
    };
    value["requestBody"] = json!({"required": true, "content": content});
    value
}

fn parameter_json(parameter: &Parameter) -> Value {
    json!({
        "name": parameter.name,
        "in": match parameter.place { Place::Path => "path", Place::Query => "query" },
        "required": parameter.place == Place::Path,
        "description": parameter.about,
        "schema": schema(&parameter.kind),
    })
}

fn answer_json(answer: Answer) -> Value {
    let example = |text: &str| serde_json::from_str::<Value>(text).unwrap_or(Value::Null);
    let json_content = |text: &str| json!({"schema": {"type": "object"}, "example": example(text)});
    match answer {
        Answer::Json(text) => {
            json!({"description": "Done.", "content": {"application/json": json_content(text)}})
        }
        Answer::JsonOrEvents(text) => json!({
            "description": "The answer; with `\"stream\": true` its parts as server-sent events, ended by `data: [DONE]`.",
            "content": {
                "application/json": json_content(text),
                "text/event-stream": {"schema": {"type": "string"}},
            },
        }),
        Answer::Text(text) => json!({
            "description": "Done.",
            "content": {"text/plain": {"schema": {"type": "string"}, "example": text}},
        }),
        Answer::Page => json!({
            "description": "A page.",
            "content": {"text/html": {"schema": {"type": "string"}}},
        }),
        Answer::Bytes => json!({
            "description": "The file.",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }),
    }
}

fn object_schema<'a>(fields: impl Iterator<Item = &'a Field>) -> Value {
    let mut properties = Map::new();
    let mut required = Vec::new();
    for field in fields {
        let mut value = schema(&field.kind);
        value["description"] = field.about.into();
        properties.insert(field.name.to_owned(), value);
        if field.required {
            required.push(field.name);
        }
    }
    let mut value = json!({"type": "object", "properties": properties});
    if !required.is_empty() {
        value["required"] = json!(required);
    }
    value
}

fn schema(kind: &Kind) -> Value {
    match kind {
        Kind::Bool => json!({"type": "boolean"}),
        Kind::Text => json!({"type": "string"}),
        Kind::OneOf(values) => json!({"type": "string", "enum": values}),
        Kind::Integer(min, max) => json!({"type": "integer", "minimum": min, "maximum": max}),
        Kind::Number(min, max) => json!({"type": "number", "minimum": min, "maximum": max}),
        Kind::List(of) => json!({"type": "array", "items": schema(of)}),
        Kind::Object(fields) => object_schema(fields.iter()),
        Kind::Map => json!({"type": "object", "additionalProperties": true}),
        Kind::Any(kinds) => json!({"anyOf": kinds.iter().map(schema).collect::<Vec<_>>()}),
        Kind::File => json!({"type": "string", "format": "binary"}),
    }
}

fn error_schema() -> Value {
    json!({
        "type": "object",
        "required": ["error"],
        "properties": {"error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "What is wrong, and what to do."},
                "type": {"type": "string", "description": "The class, for example `invalid_request_error`."},
                "param": {"type": ["string", "null"], "description": "The field that it is about."},
                "code": {"type": ["string", "null"], "description": "A word that programs can go by."},
            },
        }},
    })
}
