package hidream

import (
	"context"

	"google.golang.org/grpc/credentials"
)

// BearerToken says who calls, on every call of a connection that is made with
// grpc.WithPerRPCCredentials(hidream.BearerToken(token)).
//
// Over a connection without TLS it travels unencrypted: use that on loopback, or where something
// else encrypts.
type BearerToken string

var _ credentials.PerRPCCredentials = BearerToken("")

// GetRequestMetadata is called by gRPC before each call.
func (token BearerToken) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(token)}, nil
}

// RequireTransportSecurity is called by gRPC when a connection is made.
func (token BearerToken) RequireTransportSecurity() bool { return false }

// String keeps the token out of what is printed.
func (token BearerToken) String() string { return "BearerToken" }

// GoString keeps the token out of what is printed with %#v.
func (token BearerToken) GoString() string { return token.String() }
