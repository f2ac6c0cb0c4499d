package flags

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/hidream-grpc/hidream-grpc/clients/go/hidream"
)

// Server is which server to call, and how.
type Server struct {
	address  string
	isTLS    bool
	caFile   string
	certFile string
	keyFile  string
}

// ServerOf adds the flags of a server to a set, and returns what they fill in when it is parsed.
func ServerOf(set *flag.FlagSet) *Server {
	server := &Server{}
	set.StringVar(&server.address, "address", "localhost:8088", "host:port of the server")
	set.BoolVar(&server.isTLS, "tls", false, "encrypt the connection")
	set.StringVar(&server.caFile, "ca-file", "", "PEM file of who vouches for the server (implies -tls)")
	set.StringVar(&server.certFile, "cert-file", "", "PEM file of the certificate of the caller, for mutual TLS (implies -tls)")
	set.StringVar(&server.keyFile, "key-file", "", "PEM file of the private key of -cert-file")
	return server
}

// Connect makes a connection, with the bearer token of HIDREAM_TOKEN where it is set: not of a flag,
// since other users of the machine see the command lines of all.
func (server *Server) Connect() (*grpc.ClientConn, error) {
	transport := insecure.NewCredentials()
	if server.isTLS || server.caFile != "" || server.certFile != "" || server.keyFile != "" {
		// Without roots of ours, those of the system.
		config := &tls.Config{}
		if server.caFile != "" {
			pem, err := os.ReadFile(server.caFile)
			if err != nil {
				return nil, err
			}
			config.RootCAs = x509.NewCertPool()
			if !config.RootCAs.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("%s holds no certificate", server.caFile)
			}
		}
		if (server.certFile == "") != (server.keyFile == "") {
			return nil, errors.New("-cert-file and -key-file are given together")
		}
		if server.certFile != "" {
			certificate, err := tls.LoadX509KeyPair(server.certFile, server.keyFile)
			if err != nil {
				return nil, err
			}
			config.Certificates = []tls.Certificate{certificate}
		}
		transport = credentials.NewTLS(config)
	}
	options := append(hidream.DialOptions(), grpc.WithTransportCredentials(transport))
	if token, isSet := os.LookupEnv("HIDREAM_TOKEN"); isSet {
		if strings.TrimSpace(token) == "" {
			// An unset $TOKEN of a script must not become a call without a token.
			return nil, errors.New("HIDREAM_TOKEN: is empty; leave it out to call without a token")
		}
		options = append(options, grpc.WithPerRPCCredentials(hidream.BearerToken(token)))
	}
	return grpc.NewClient(server.address, options...)
}
