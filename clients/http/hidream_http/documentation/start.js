// Asks no validator elsewhere, and leads to no other document.
SwaggerUIBundle({ url: "/openapi.json", dom_id: "#routes", validatorUrl: null, queryConfigEnabled: false });
