package hidream

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

func TestAGenerationThatBreaksAnywhereFollowsTheSameJobAndGetsNothingTwice(t *testing.T) {
	numEvents := len((&breakingServer{}).events())
	for numSent := 1; numSent < numEvents; numSent++ {
		service := &breakingServer{breaks: []int{numSent, 0}}
		var sequences []int64
		images, err := clientOf(t, service).Generate(t.Context(), &hidreamv1.GenerateRequest{}, ReconnectPolicy{},
			func(event *hidreamv1.JobEvent) { sequences = append(sequences, event.GetSequence()) })
		if err != nil {
			t.Fatalf("broken after %d: %v", numSent, err)
		}
		if want := []int64{10, 20, int64(10 * numEvents)}; !reflect.DeepEqual(sequences, want) {
			t.Errorf("broken after %d: events %v, not %v", numSent, sequences, want)
		}
		if len(images) != 1 || !bytes.Equal(images[0].Data, file) {
			t.Errorf("broken after %d: another file", numSent)
		}
		first := service.generated[0]
		if first.GetRequestId() == "" || first.GetReconnectWindow().AsDuration() != maxReconnectWindow {
			t.Errorf("the request is %v", first)
		}
		for _, again := range service.generated[1:] {
			if again.GetRequestId() != first.GetRequestId() {
				t.Errorf("made again as %v, not %v", again, first)
			}
		}
	}
}

func TestAGenerationThatGetsNoAnswerForTooLongNamesItsJob(t *testing.T) {
	service := &breakingServer{breaks: append([]int{1}, make([]int, 1000)...)}
	var told error
	policy := ReconnectPolicy{ReconnectTime: 200 * time.Millisecond, OnConnectionLost: func(err error) { told = err }}
	_, err := clientOf(t, service).Generate(t.Context(), &hidreamv1.GenerateRequest{}, policy, nil)
	for _, err := range []error{err, told} {
		var lost *LostJobError
		if !errors.As(err, &lost) || lost.JobID != jobID || status.Code(err) != codes.Unavailable {
			t.Fatalf("got %v", err)
		}
		requestID := service.generated[0].GetRequestId()
		if lost.RequestID != requestID || !strings.Contains(err.Error(), "(job "+jobID+", request id "+requestID+")") {
			t.Errorf("%q does not say how to go on", err)
		}
	}
}

func TestACallerThatLeavesWhileTheConnectionIsLostStopsNoJob(t *testing.T) {
	service := &breakingServer{breaks: append([]int{1}, make([]int, 1000)...)}
	ctx, cancel := context.WithCancel(t.Context())
	policy := ReconnectPolicy{OnConnectionLost: func(error) { cancel() }}
	request := &hidreamv1.GenerateRequest{ReconnectWindow: durationpb.New(time.Second)}
	if _, err := clientOf(t, service).Generate(ctx, request, policy, nil); status.Code(err) != codes.Canceled {
		t.Fatalf("got %v", err)
	}
	if len(service.cancelled) > 0 {
		t.Errorf("cancelled %v", service.cancelled)
	}
	if window := service.generated[0].GetReconnectWindow().AsDuration(); window != time.Second {
		t.Errorf("the window is %v", window)
	}
}

func TestACallerThatLeavesStopsItsJobUnlessItNamedTheRequest(t *testing.T) {
	for requestID, want := range map[string][]string{"": {jobID}, "named": nil} {
		service := &breakingServer{}
		ctx, cancel := context.WithCancel(t.Context())
		_, err := clientOf(t, service).Generate(ctx, &hidreamv1.GenerateRequest{RequestId: requestID},
			ReconnectPolicy{}, func(*hidreamv1.JobEvent) { cancel() })
		if err != nil && status.Code(err) != codes.Canceled {
			t.Fatal(err)
		}
		if err != nil && !reflect.DeepEqual(service.cancelled, want) {
			t.Errorf("%q: cancelled %v, not %v", requestID, service.cancelled, want)
		}
	}
}

func TestACallThatTheServerWantsLaterIsMadeTwiceMore(t *testing.T) {
	service := &breakingServer{numBusy: 2}
	if _, err := clientOf(t, service).Submit(t.Context(), &hidreamv1.SubmitJobRequest{}); err != nil {
		t.Fatal(err)
	}
	if ids := service.submitted; len(ids) != 3 || ids[0] == "" || ids[0] != ids[1] || ids[1] != ids[2] {
		t.Errorf("submitted as %v", ids)
	}
	service.numBusy = 3
	if _, err := clientOf(t, service).Submit(t.Context(), &hidreamv1.SubmitJobRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v", err)
	}
}

func TestACallWithoutADeadlineHasThatOfTheClient(t *testing.T) {
	client := clientOf(t, &breakingServer{isSilent: true})
	client.Timeout = 50 * time.Millisecond
	if _, err := client.Get(t.Context(), jobID); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("got %v", err)
	}
}

// TestProxy is run again in processes whose environment names a proxy: Go reads it once a process.
func TestProxy(t *testing.T) {
	target := os.Getenv("TEST_PROXIED_TARGET")
	if target == "" {
		t.Skip("for processes of the next test")
	}
	options := append(DialOptions(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	connection, err := grpc.NewClient(target, options...)
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()
	_, err = NewClient(connection).Get(t.Context(), jobID)
	t.Logf("the call ended with %v", err)
	_, err = NewClient(connection).Watch(t.Context(), jobID, ReconnectPolicy{}, nil)
	t.Logf("the watch ended with %v", err)
}

func TestAProxyIsNamedWhenItFailsAndLeftOutForThisMachine(t *testing.T) {
	const proxy = "127.0.0.1:1"
	for target, isNamed := range map[string]bool{"192.0.2.1:80": true, "127.0.0.1:2": false, "localhost:2": false,
		"unix:///no/such.sock": false} {
		command := exec.Command(os.Args[0], "-test.run=^TestProxy$", "-test.v")
		command.Env = append(os.Environ(), "TEST_PROXIED_TARGET="+target,
			"HTTPS_PROXY=http://name:secret@"+proxy, "https_proxy=http://name:secret@"+proxy, "NO_PROXY=", "no_proxy=")
		output, err := command.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, output)
		}
		if n := strings.Count(string(output), "(through the proxy "+proxy+")"); n != map[bool]int{true: 2}[isNamed] {
			t.Errorf("%s: named %d times:\n%s", target, n, output)
		}
		if strings.Contains(string(output), "secret") || !isNamed && strings.Contains(string(output), proxy) {
			t.Errorf("%s:\n%s", target, output)
		}
	}
}
